package edge

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestClaimsAboutClients: what a client says in the fields by which proxies tell
// about the client does not reach a backend, unless the client is trusted; its
// certificate is never taken from it.
func TestClaimsAboutClients(t *testing.T) {
	claims := []string{
		"X-Forwarded-Client-Cert", "X-Real-IP", "x_real_ip", "X-SSL-Client-Verify", "X-SSL-Client-DN", "X-Forwarded-User", "Client-Cert", "Client-Cert-Chain", "Client_Cert",
	}
	b := serveHTTP1(t, func(r *http.Request, _ []byte) string {
		var got []string
		for _, name := range claims {
			if len(r.Header[http.CanonicalHeaderKey(name)]) > 0 && r.Header[http.CanonicalHeaderKey(name)][0] == "claimed" {
				got = append(got, name)
			}
		}
		return ok(strings.Join(got, " "))
	})
	for _, trusted := range []bool{false, true} {
		x := newLegs(t, b.address, func(l *resealv1.Listener, _ *resealv1.BackendPool) {
			if trusted {
				l.Forwarded = &resealv1.Forwarded{TrustedCidrs: []string{"127.0.0.0/8"}}
			}
		})
		want := ""
		if trusted {
			want = strings.Join(claims[:6], " ")
		}
		var sent strings.Builder
		var fields []string
		for _, name := range claims {
			fmt.Fprintf(&sent, "%s: claimed\r\n", name)
			fields = append(fields, strings.ToLower(name), "claimed")
		}
		if _, got := x.send("GET / HTTP/1.1\r\nHost: public.test\r\n" + sent.String() + "\r\n"); got != want {
			t.Errorf("h1, trusted %v: the backend got %q, want %q", trusted, got, want)
		}
		c := x.dialH2()
		c.get(1, "/", "public.test", fields...)
		if a := c.answer(1); a.body != want {
			t.Errorf("h2, trusted %v: the backend got %q, want %q", trusted, a.body, want)
		}
	}
}
