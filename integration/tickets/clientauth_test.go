package tickets

import (
	"crypto/tls"
	"fmt"
	"testing"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// TestClientNoLongerTrusted: after a policy no longer vouches for a client its
// next resumption is refused, on every edge, as soon as the edge has acked. A
// client that is still trusted makes one full handshake.
func TestClientNoLongerTrusted(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3)
	first, second := newAuthority(t), newAuthority(t)
	shown, err := first.Issue("client")
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := shown.TLS()
	if err != nil {
		t.Fatal(err)
	}
	revoked, err := first.Revoke(shown)
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string
	for _, n := range f.edges {
		addresses = append(addresses, f.at(n))
	}
	listener := f.manifest("  tlsPolicy: clients\n")
	full, refused := 0, 0 // handshakes of clients with a ticket that then was of no use
	for _, test := range []struct {
		name, mode    string
		roots, revoke []byte
		trusted       bool
	}{
		{"another CA", "require", second.PEM(), nil, false},
		{"a further CA", "require", append(append([]byte{}, first.PEM()...), second.PEM()...), nil, true},
		{"revoked", "require", first.PEM(), revoked, false},
		{"optional, another CA", "optional", second.PEM(), nil, false},
		{"optional, revoked", "optional", first.PEM(), revoked, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			f.apply(listener + clientPolicy(test.mode, first.PEM(), nil))
			var clients []*client
			for _, version := range bothVersions {
				c := newClient(f.Site, version, &counts{})
				c.config.Certificates = []tls.Certificate{certificate}
				clients = append(clients, c)
				for i, address := range append(addresses, addresses...) {
					state, err := c.visit(t.Context(), address)
					if err != nil {
						t.Fatal(err)
					}
					if state.DidResume != (i > 0) {
						t.Fatalf("visit %d: resumed %v", i, state.DidResume)
					}
				}
			}
			f.apply(clientPolicy(test.mode, test.roots, test.revoke))
			for i, address := range addresses {
				for _, c := range clients {
					what := fmt.Sprint(tls.VersionName(c.config.MaxVersion), " on ", f.edges[i].ID)
					again := newClient(f.Site, c.config.MaxVersion, &counts{})
					again.config.Certificates = c.config.Certificates
					again.hold(c)
					state, err := again.visit(t.Context(), address)
					if state != nil && state.DidResume {
						t.Errorf("%s: resumed", what)
					}
					if (err == nil) != test.trusted {
						t.Errorf("%s: %v", what, err)
					}
					if err == nil {
						full++
					} else {
						refused++
					}
				}
			}
		})
	}
	// The counters tell a refused client from one that met a broken edge.
	var mismatches, failed int64
	for _, n := range f.edges {
		stats := f.stats(n)
		mismatches += stats.Misses["policy_mismatch"]
		failed += stats.Handshakes.Failed
	}
	perPolicy := len(f.edges) * len(bothVersions)
	if mismatches != int64(full) || full != perPolicy {
		t.Errorf("%d clients were still served, the edges count %d misses for policy_mismatch, want %d", full, mismatches, perPolicy)
	}
	if failed != int64(refused) || refused != 4*perPolicy {
		t.Errorf("%d clients were refused, the edges count %d failed handshakes, want %d", refused, failed, 4*perPolicy)
	}
}

func newAuthority(t *testing.T) *peers.Authority {
	t.Helper()
	authority, err := peers.NewAuthority("clients")
	if err != nil {
		t.Fatal(err)
	}
	return authority
}

// clientPolicy is a manifest of the TLSPolicy "clients".
func clientPolicy(mode string, roots, revoked []byte) string {
	manifest := fmt.Sprintf("---\napiVersion: reseal/v1\nkind: TLSPolicy\nmetadata: {name: clients}\nspec:\n  clientAuth:\n    mode: %s\n    caPem: |\n%s\n",
		mode, harness.Indent(roots, 6))
	if revoked != nil {
		manifest += "    crlPem: |\n" + harness.Indent(revoked, 6) + "\n"
	}
	return manifest
}
