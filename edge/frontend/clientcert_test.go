package frontend

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"net/http"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestClientCertificateAfterResumption: a resumed connection, on which no
// certificate is shown, tells about the one of the session's first handshake.
func TestClientCertificateAfterResumption(t *testing.T) {
	shown, roots := selfSigned(t, "client")
	digest := sha256.Sum256(shown.Leaf.Raw)
	fingerprint := hex.EncodeToString(digest[:])
	for _, version := range bothVersions {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			told := make(chan string, 10)
			upstream := upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
				told <- r.Header.Get("X-Forwarded-Client-Cert")
				return textResponse(200, ""), nil
			}}
			e := newEdge(t, upstream, authPolicy("auth", tls.RequireAndVerifyClientCert, roots, nil), func(l *exchange.Listener) {
				l.Spec.ClientCertificate = &resealv1.ClientCertificate{Forward: resealv1.ClientCertificate_FORWARD_XFCC}
			})
			cache := &oneCache{}
			var first string
			for i := range 3 {
				state := e.visit(withVersion(version), withCache(cache), func(c *tls.Config) { c.Certificates = []tls.Certificate{shown} })
				got := <-told
				if i == 0 {
					first = got
				}
				if state.DidResume != (i > 0) || got != first || !strings.HasPrefix(got, "Hash="+fingerprint+";") {
					t.Errorf("visit %d: resumed %v, told %q", i, state.DidResume, got)
				}
				if record := e.logged(i + 1); record["client_cert_sha256"] != fingerprint || record["client_subject"] != "CN=client" {
					t.Errorf("visit %d: logged %v", i, record)
				}
			}
		})
	}
}
