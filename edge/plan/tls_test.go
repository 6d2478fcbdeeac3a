package plan

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// handshake connects client and server in memory and returns the client's state
// and both errors. The client also waits for what follows the handshake.
func handshake(t *testing.T, client, server *tls.Config) (tls.ConnectionState, error, error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	done := make(chan error, 1)
	go func() {
		accepted, err := listener.Accept()
		if err != nil {
			done <- err
			return
		}
		defer accepted.Close()
		conn := tls.Server(accepted, server)
		if err = conn.Handshake(); err == nil {
			_, err = conn.Write([]byte("x"))
		}
		done <- err
	}()
	dialed, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialed.Close()
	conn := tls.Client(dialed, client)
	if err = conn.Handshake(); err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	state := conn.ConnectionState()
	dialed.Close()
	return state, err, <-done
}

func TestCertificateChoice(t *testing.T) {
	ca := newAuthority(t)
	certificates := []*resealv1.Resource{}
	add := func(name string, options leafOptions) {
		chain, key, _ := ca.issue(options)
		certificates = append(certificates, named(name, &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}))
	}
	add("default", leafOptions{names: []string{"default.test"}})
	add("wild", leafOptions{names: []string{"*.app.test"}})
	add("exact", leafOptions{names: []string{"www.app.test"}})
	add("both-rsa", leafOptions{names: []string{"both.test"}, rsa: true})
	add("both-ecdsa", leafOptions{names: []string{"both.test"}})
	listener := mustCompile(t, append(certificates, named("l", &resealv1.Listener{
		Address: ":1", Certificates: []string{"default", "wild", "exact", "both-rsa", "both-ecdsa"},
	}))...).Listeners[0]
	rsaOnly := []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	ecdsaOnly := []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
	tests := []struct {
		sni    string
		suites []uint16
		want   string
		key    x509.PublicKeyAlgorithm
	}{
		{"www.app.test", nil, "www.app.test", x509.ECDSA},
		{"WWW.App.test", nil, "www.app.test", x509.ECDSA},
		{"api.app.test", nil, "*.app.test", x509.ECDSA},
		{"a.b.app.test", nil, "default.test", x509.ECDSA},
		{"app.test", nil, "default.test", x509.ECDSA},
		{"unknown.test", nil, "default.test", x509.ECDSA},
		{"", nil, "default.test", x509.ECDSA},
		{"both.test", nil, "both.test", x509.ECDSA}, // costs less
		{"both.test", rsaOnly, "both.test", x509.RSA},
		{"both.test", ecdsaOnly, "both.test", x509.ECDSA},
		{"unknown.test", rsaOnly, "both.test", x509.RSA}, // better than none
	}
	for _, test := range tests {
		client := &tls.Config{ServerName: test.sni, InsecureSkipVerify: true, CipherSuites: test.suites}
		if test.suites != nil {
			client.MaxVersion = tls.VersionTLS12
		}
		state, err, serverErr := handshake(t, client, listener.TLS)
		if err != nil || serverErr != nil {
			t.Errorf("%q: %v, %v", test.sni, err, serverErr)
			continue
		}
		leaf := state.PeerCertificates[0]
		if leaf.DNSNames[0] != test.want || leaf.PublicKeyAlgorithm != test.key {
			t.Errorf("%q: got %s with %v, want %s with %v", test.sni, leaf.DNSNames[0], leaf.PublicKeyAlgorithm, test.want, test.key)
		}
	}
}

func TestALPN(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{names: []string{"app.test"}})
	tcp := pool("10.0.0.1:1")
	tcp.Protocol = resealv1.BackendPool_PROTOCOL_TCP
	p := mustCompile(t, named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}), named("tcp", tcp),
		named("old", &resealv1.TLSPolicy{Alpn: []string{"http/1.1"}}),
		named("a-https", &resealv1.Listener{Address: ":1", Certificates: []string{"cert"}}),
		named("b-old", &resealv1.Listener{Address: ":2", Certificates: []string{"cert"}, TlsPolicy: "old"}),
		named("c-tls", &resealv1.Listener{Address: ":3", Certificates: []string{"cert"}, Protocol: resealv1.Listener_PROTOCOL_TLS, Pool: "tcp"}))
	for i, want := range []string{"h2", "http/1.1", ""} {
		client := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1", "h2"}}
		state, err, _ := handshake(t, client, p.Listeners[i].TLS)
		if err != nil || state.NegotiatedProtocol != want {
			t.Errorf("%s negotiates %q (%v), want %q", p.Listeners[i].Name, state.NegotiatedProtocol, err, want)
		}
	}
	if p.Pools["tcp"].TLS.NextProtos != nil {
		t.Error("a tcp pool offers ALPN")
	}
}

func TestVerification(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	issued := leafOptions{names: []string{"real.test", "*.wild.test"}, ips: []string{"192.0.2.7", "2001:db8::7"}, uris: []string{"spiffe://td/app"}}
	tests := []struct {
		name   string
		issuer *authority
		sans   []string
		skip   bool
		fixed  string
		ok     bool
	}{
		{"server name", ca, nil, false, "real.test", true},
		{"other server name", ca, nil, false, "other.test", false},
		{"dns", ca, []string{"other.test", "REAL.test"}, false, "other.test", true},
		{"dns by wildcard", ca, []string{"x.wild.test"}, false, "", true},
		{"wildcard itself", ca, []string{"*.wild.test"}, false, "", true},
		{"ip", ca, []string{"192.0.2.7"}, false, "", true},
		{"ip6", ca, []string{"2001:DB8:0::7"}, false, "", true},
		{"uri", ca, []string{"spiffe://td/app"}, false, "", true},
		{"none of them", ca, []string{"nope.test", "192.0.2.8", "spiffe://td/app2", "*.real.test"}, false, "real.test", false},
		{"right name, foreign root", foreign, []string{"real.test"}, false, "real.test", false},
		{"server name, foreign root", foreign, nil, false, "real.test", false},
		{"skip", foreign, nil, true, "other.test", true},
	}
	for _, test := range tests {
		for _, max := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(test.name+" "+tls.VersionName(max), func(t *testing.T) {
				chain, key, _ := test.issuer.issue(issued)
				pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
				if err != nil {
					t.Fatal(err)
				}
				spec := pool("10.0.0.1:443")
				spec.Tls = &resealv1.BackendTLS{
					Trust:           &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: ca.pem}},
					SubjectAltNames: test.sans, InsecureSkipVerify: test.skip, ServerName: test.fixed,
				}
				cfg := mustCompile(t, named("p", spec)).Pools["p"].TLS.Clone()
				cfg.MaxVersion = max
				_, err, _ = handshake(t, cfg, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}})
				if test.ok && err != nil {
					t.Error(err)
				}
				var verification *tls.CertificateVerificationError
				if !test.ok && !errors.As(err, &verification) {
					t.Errorf("got %v, want a verification error", err)
				}
			})
		}
	}
}

func TestVerificationHoldsAtResumption(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{names: []string{"real.test"}})
	pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	config := func(san string) *tls.Config {
		spec := pool("10.0.0.1:443")
		spec.Tls = &resealv1.BackendTLS{
			Trust:           &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: ca.pem}},
			SubjectAltNames: []string{san}, ServerName: "real.test",
		}
		return mustCompile(t, named("p", spec)).Pools["p"].TLS.Clone()
	}
	for _, max := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		server := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}, MaxVersion: max}
		cache := tls.NewLRUClientSessionCache(0)
		good := config("real.test")
		good.ClientSessionCache = cache
		for i := range 2 {
			state, err, _ := handshake(t, good, server)
			if err != nil || state.DidResume != (i == 1) {
				t.Fatalf("handshake %d: resumed %v, %v", i, state.DidResume, err)
			}
		}
		bad := config("other.test")
		bad.ClientSessionCache = cache
		if state, err, _ := handshake(t, bad, server); !errors.Is(err, errNoSAN) {
			t.Errorf("resumed %v with other names: %v", state.DidResume, err)
		}
	}
}

func TestClientCertificates(t *testing.T) {
	serverCA, clientCA := newAuthority(t), newAuthority(t)
	chain, key, _ := serverCA.issue(leafOptions{names: []string{"app.test"}})
	goodChain, goodKey, _ := clientCA.issue(leafOptions{client: true})
	badChain, badKey, revoked := clientCA.issue(leafOptions{client: true})
	foreignChain, foreignKey, _ := serverCA.issue(leafOptions{client: true})
	server := func(mode resealv1.ClientAuth_Mode) *tls.Config {
		return mustCompile(t, named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}),
			named("p", &resealv1.TLSPolicy{ClientAuth: &resealv1.ClientAuth{Mode: mode, CaPem: clientCA.pem, CrlPem: clientCA.revoke(revoked)}}),
			named("l", &resealv1.Listener{Address: ":1", Certificates: []string{"cert"}, TlsPolicy: "p"})).Listeners[0].TLS
	}
	client := func(chain, key string) *tls.Config {
		spec := pool("10.0.0.1:443")
		spec.Tls = &resealv1.BackendTLS{ServerName: "app.test",
			Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: serverCA.pem}}}
		resources := []*resealv1.Resource{named("p", spec)}
		if chain != "" {
			spec.Tls.ClientCertificate = "client"
			resources = append(resources, named("client", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}))
		}
		return mustCompile(t, resources...).Pools["p"].TLS
	}
	require, optional := server(resealv1.ClientAuth_MODE_REQUIRE), server(resealv1.ClientAuth_MODE_OPTIONAL)
	tests := []struct {
		name   string
		server *tls.Config
		client *tls.Config
		ok     bool
	}{
		{"require, good", require, client(goodChain, goodKey), true},
		{"require, none", require, client("", ""), false},
		{"require, foreign", require, client(foreignChain, foreignKey), false},
		{"require, revoked", require, client(badChain, badKey), false},
		{"optional, none", optional, client("", ""), true},
		{"optional, good", optional, client(goodChain, goodKey), true},
		{"optional, foreign", optional, client(foreignChain, foreignKey), false},
		{"optional, revoked", optional, client(badChain, badKey), false},
	}
	for _, test := range tests {
		if _, _, err := handshake(t, test.client, test.server); (err == nil) != test.ok {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}
