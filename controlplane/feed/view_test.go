package feed

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func twoSites(eu, us map[string]string) *source {
	withTLS := pool("eu-app", "e:1")
	withTLS.GetBackendPool().Tls = &resealv1.BackendTLS{Policy: "strict", ClientCertificate: "client"}
	front := listener("eu-web", "eu-app", eu, "eu-cert", "shared-cert")
	front.GetListener().TlsPolicy = "modern"
	s := newSource()
	s.apply(many(
		front, listener("us-web", "us-app", us, "us-cert", "shared-cert"), listener("lost", "nowhere", map[string]string{"site": "mars"}),
		withTLS, pool("us-app", "u:1"), pool("routed", "r:1"), pool("orphan", "o:1"),
		certificate("eu-cert", ""), certificate("us-cert", ""), certificate("shared-cert", ""), certificate("client", ""), certificate("spare", ""),
		policy("strict"), policy("modern"), policy("unused"),
		route("both", []string{"us-web", "eu-web"}, "routed"), route("us", []string{"us-web"}, "us-app"), route("mars", []string{"lost"}, "orphan"),
		keyring("default", nil), keyring("eu", eu),
	))
	return s
}

func TestSelectors(t *testing.T) {
	eu, us := map[string]string{"site": "eu"}, map[string]string{"site": "us", "tier": "1"}
	for name, test := range map[string]struct {
		labels map[string]string
		want   []string
	}{
		"eu": {eu, []string{
			"BackendPool/eu-app", "BackendPool/routed",
			"Certificate/client", "Certificate/eu-cert", "Certificate/shared-cert",
			"Keyring/default", "Keyring/eu", "Listener/eu-web", "Route/both", "TLSPolicy/modern", "TLSPolicy/strict",
		}},
		"us": {us, []string{
			"BackendPool/routed", "BackendPool/us-app", "Certificate/shared-cert", "Certificate/us-cert",
			"Keyring/default", "Listener/us-web", "Route/both", "Route/us",
		}},
		"half of us":         {map[string]string{"site": "us"}, []string{"Keyring/default"}},
		"dangling is left":   {map[string]string{"site": "mars"}, []string{"BackendPool/orphan", "Keyring/default", "Listener/lost", "Route/mars"}},
		"nothing but common": {nil, []string{"Keyring/default"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := startPlane(t, twoSites(eu, us)).node("e1", test.labels, newDisk())
				settle(0)
				if diff := cmp.Diff(test.want, keys(n.newest())); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

// Labels of the certificate's enrolment replace what an edge says of itself.
func TestLabelsOfEnrolmentWin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		s.apply(many(listener("secret", "app", map[string]string{"site": "hq"})))
		p := startPlane(t, s)
		p.server.config.Edge = func(ctx context.Context) (string, map[string]string, error) {
			id, _, err := callingEdge(ctx)
			return id, map[string]string{"site": "street"}, err
		}
		n := p.node("e1", map[string]string{"site": "hq"}, newDisk())
		settle(0)
		if n.newest().Get("Listener", "secret") != nil {
			t.Error("the edge got a listener by labels of its own")
		}
		if got := p.edge("e1").GetLabels()["site"]; got != "street" {
			t.Errorf("listed with site %q", got)
		}
	})
}
