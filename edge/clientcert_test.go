package edge

import (
	"bufio"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// certificateFields are those that describe a client's certificate.
var certificateFields = []string{"Client-Cert", "Client-Cert-Chain", "X-Forwarded-Client-Cert"}

// serveFields answers with the fields of a request that describe a certificate,
// over HTTP/2.
func serveFields(c net.Conn, _ int) {
	serveH2(c, func(framer *http2.Framer, f *http2.MetaHeadersFrame) {
		header := http.Header{}
		for _, field := range f.RegularFields() {
			header.Add(field.Name, field.Value)
		}
		answerH2(framer, f.StreamID, status200, told(header))
	})
}

// told is what a header says about a client's certificate.
func told(header http.Header) string {
	var b strings.Builder
	for _, name := range certificateFields {
		for _, value := range header[name] {
			fmt.Fprintf(&b, "%s: %s\n", name, value)
		}
	}
	return b.String()
}

// TestClientCertificateToBackend: the backend is told about the certificate that
// was verified, in the form that the listener chooses, and never of one that a
// client claims to have.
func TestClientCertificateToBackend(t *testing.T) {
	shown := issue(t, func(c *x509.Certificate) {
		c.Subject = pkix.Name{CommonName: "Zoë \"x\",URI=spiffe://evil\r\nEvil: 1\\", Organization: []string{"A, B"}}
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "a.test", Path: "/b"}, {Scheme: "urn", Opaque: `x",Hash=0;y\z`}}
		c.DNSNames = []string{"a.test", `b",URI=c`}
	}, "a.test")
	digest := sha256.Sum256(shown.Leaf.Raw)
	fingerprint := hex.EncodeToString(digest[:])
	const subject = `CN=Zo\C3\AB \22x\22\,URI=spiffe://evil\0D\0AEvil: 1\5C,O=A\, B`
	sequence := func(der []byte) string { return ":" + base64.StdEncoding.EncodeToString(der) + ":" }
	encoded := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: shown.Leaf.Raw}))
	encoded = strings.NewReplacer("\n", "%0A", " ", "%20", "+", "%2B", "/", "%2F", "=", "%3D").Replace(encoded)

	h1 := serveHTTP1(t, func(r *http.Request, _ []byte) string { return ok(told(r.Header)) })
	h2 := serveRaw(t, "h2", serveFields)
	for _, test := range []struct {
		forward        resealv1.ClientCertificate_Forward
		with, without  string
		trustedWithout string // of a trusted client without a certificate
	}{
		{resealv1.ClientCertificate_FORWARD_UNSPECIFIED, "", "", "X-Forwarded-Client-Cert: claimed\n"},
		{resealv1.ClientCertificate_FORWARD_NONE, "", "", "X-Forwarded-Client-Cert: claimed\n"},
		{resealv1.ClientCertificate_FORWARD_RFC9440,
			"Client-Cert: " + sequence(shown.Leaf.Raw) + "\nClient-Cert-Chain: " + sequence(authority().cert.Raw) + "\n",
			"", "X-Forwarded-Client-Cert: claimed\n"},
		{resealv1.ClientCertificate_FORWARD_XFCC,
			"X-Forwarded-Client-Cert: Hash=" + fingerprint + `;Cert="` + encoded + `";Subject="` + subject +
				`";URI=spiffe://a.test/b;URI="urn:x%22,Hash=0;y%5Cz";DNS=a.test` + "\n", "", ""},
	} {
		for name, b := range map[string]*rawBackend{"h1": h1, "h2": h2} {
			for _, trusted := range []bool{false, true} {
				x := newLegs(t, b.address, func(l *resealv1.Listener, _ *resealv1.BackendPool) {
					l.ClientCertificate = &resealv1.ClientCertificate{Forward: test.forward}
					if trusted {
						l.Forwarded = &resealv1.Forwarded{TrustedCidrs: []string{"127.0.0.0/8"}}
					}
				})
				for _, certificate := range []bool{false, true} {
					where := fmt.Sprint(test.forward, " to ", name, ", trusted ", trusted, ", certificate ", certificate)
					want := test.without
					if trusted {
						want = test.trustedWithout
					}
					if certificate {
						want = test.with
						if trusted && test.forward != resealv1.ClientCertificate_FORWARD_XFCC {
							want += test.trustedWithout
						}
					}
					x.checkTold(where, want, func(c *tls.Config) {
						if certificate {
							c.Certificates = []tls.Certificate{shown}
						}
					})
				}
				x.checkLogged(4, `"client_subject":`+fmt.Sprintf("%q", subject), `"client_cert_sha256":"`+fingerprint+`"`)
			}
		}
	}
}

// checkLogged waits for the records of n requests without a certificate and n
// with one, which alone say both.
func (x *bothLegs) checkLogged(n int, subject, fingerprint string) {
	x.t.Helper()
	var records []string
	for end := time.Now().Add(patience); len(records) < 2*n && time.Now().Before(end); time.Sleep(time.Millisecond) {
		records = strings.Split(strings.TrimSpace(x.log.String()), "\n")
	}
	with, without := 0, 0
	for _, record := range records {
		switch {
		case strings.Contains(record, subject) && strings.Contains(record, fingerprint):
			with++
		case !strings.Contains(record, "client_subject") && !strings.Contains(record, "client_cert_sha256"):
			without++
		}
	}
	if with != n || without != n || len(records) != 2*n {
		x.t.Errorf("access log: %d with a certificate, %d without, of %q", with, without, records)
	}
}

// checkTold makes two requests on one connection of each protocol, with false
// claims, and looks at what the backend got.
func (x *bothLegs) checkTold(where, want string, change func(*tls.Config)) {
	x.t.Helper()
	var claims strings.Builder
	var fields []string
	for _, name := range append([]string{"client_cert", "CLIENT-CERT-chain"}, certificateFields...) {
		fmt.Fprintf(&claims, "%s: claimed\r\n", name)
		fields = append(fields, strings.ToLower(name), "claimed")
	}
	h1 := x.dial("http/1.1", change)
	defer h1.Close()
	h2 := x.dialH2(change)
	defer h2.conn.Close()
	reader := bufio.NewReader(h1)
	for i := range 2 {
		if _, got := x.exchange(h1, reader, "GET / HTTP/1.1\r\nHost: public.test\r\n"+claims.String()+"\r\n"); got != want {
			x.t.Errorf("%s: h1: the backend got\n%s, want\n%s", where, got, want)
		}
		h2.get(uint32(2*i+1), "/", "public.test", fields...)
		if a := h2.answer(uint32(2*i + 1)); a.body != want {
			x.t.Errorf("%s: h2: the backend got\n%s, want\n%s", where, a.body, want)
		}
	}
}

// TestChangedClaims: what is removed from requests can be added to and taken from.
func TestChangedClaims(t *testing.T) {
	names := []string{"X-Real-Ip", "X-Ssl-Client-Dn", "X_ssl_client_verify", "X-Forwarded-User", "Client-Cert", "X-Auth-User", "X_auth_id", "X-User", "X-Users"}
	b := serveHTTP1(t, func(r *http.Request, body []byte) string {
		var got []string
		for _, name := range names {
			if r.Header.Get(name) != "" {
				got = append(got, name)
			}
			if r.Trailer.Get(name) != "" {
				got = append(got, "trailer "+name)
			}
		}
		return ok(strings.Join(got, " "))
	})
	for _, test := range []struct {
		forwarded *resealv1.Forwarded
		want      string
	}{
		{nil, "X-Auth-User trailer X-Auth-User X_auth_id trailer X_auth_id X-User trailer X-User X-Users trailer X-Users"},
		{&resealv1.Forwarded{RemoveHeaders: []string{"x-auth-*", "X_USER"}}, "X-Users trailer X-Users"},
		{&resealv1.Forwarded{RemoveHeaders: []string{"X-Auth-*", "X-User", "X-Users"}, KeepHeaders: []string{"x_real_ip", "X-SSL-Client-*"}},
			"X-Real-Ip X-Ssl-Client-Dn X_ssl_client_verify"},
		{&resealv1.Forwarded{RemoveHeaders: []string{"X-Auth-*", "X-User", "X-Users"}, KeepHeaders: []string{"X-SSL-Client-DN", "X-Forwarded-*"}},
			"X-Ssl-Client-Dn X-Forwarded-User"},
		{&resealv1.Forwarded{TrustedCidrs: []string{"127.0.0.0/8"}, RemoveHeaders: []string{"X-Auth-*", "X-User", "X-Real-IP"}},
			"X-Real-Ip X-Ssl-Client-Dn X_ssl_client_verify X-Forwarded-User X-Auth-User trailer X-Auth-User X_auth_id trailer X_auth_id X-User trailer X-User X-Users trailer X-Users"},
	} {
		x := newLegs(t, b.address, func(l *resealv1.Listener, _ *resealv1.BackendPool) { l.Forwarded = test.forwarded })
		var sent strings.Builder
		var fields []string
		for _, name := range names {
			fmt.Fprintf(&sent, "%s: claimed\r\n", name)
			fields = append(fields, strings.ToLower(name), "claimed")
		}
		head := "POST / HTTP/1.1\r\nHost: public.test\r\nTransfer-Encoding: chunked\r\nTrailer: " + strings.Join(names, ", ") + "\r\n"
		if _, got := x.send(head + sent.String() + "\r\n0\r\n" + sent.String() + "\r\n"); got != test.want {
			t.Errorf("h1, %v: the backend got\n%q, want\n%q", test.forwarded, got, test.want)
		}
		c := x.dialH2()
		c.headers(1, false, append([]string{":method", "POST", ":scheme", "https", ":path", "/", ":authority", "public.test",
			"trailer", strings.ToLower(strings.Join(names, ","))}, fields...)...)
		c.headers(1, true, fields...)
		if a := c.answer(1); a.body != test.want {
			t.Errorf("h2, %v: the backend got\n%q, want\n%q", test.forwarded, a.body, test.want)
		}
	}
}
