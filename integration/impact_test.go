package integration

import (
	"net"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// TestImpact: what a change would do to edges is known before it is made, and asking
// does nothing to them.
func TestImpact(t *testing.T) {
	p := newPair(t)
	for i := range p.edges {
		p.serve(i) // so that there are sessions and connections
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	candidate := p.Manifest(strings.Replace(p.Pool("app", p.backends, ""), "    trust:\n", "    subjectAltNames: [other.example]\n    trust:\n", 1) +
		harness.Listener("taken", taken.Addr().String(), "edge: b", "  pool: app\n") +
		harness.Listener("web-a", p.Address(), "edge: a", "  pool: app\n"))
	before := p.Edges()
	result := p.TryCtl("diff", "--impact", "-f", candidate)
	t.Log(result.Stdout)
	for _, text := range []string{
		"impact: asked 2 edges, 2 answered",
		"1 edge (edge-b) refuses: Listener/taken: spec.address: address already in use",
		"verification of 1 pool changes: about ",
		"Listener/web-a moves to 127.0.0.1:",
	} {
		if !strings.Contains(result.Stdout, text) {
			t.Errorf("diff --impact does not say %q:\n%s%s", text, result.Stdout, result.Stderr)
		}
	}
	var found struct {
		Impact struct {
			FullHandshakes int64 `json:"fullHandshakes"`
			Connections    int64 `json:"connections"`
		} `json:"impact"`
	}
	p.CtlJSON(&found, "apply", "--dry-run", "--impact", "-f", candidate)
	if found.Impact.FullHandshakes < 2 || found.Impact.Connections < 2 {
		t.Errorf("impact is %+v, want a full handshake and a connection for each of 2 edges at least", found.Impact)
	}
	after := p.Edges()
	for i := range after {
		if after[i].AckedRevision != before[i].AckedRevision || after[i].State != "synced" || after[i].Drifted {
			t.Errorf("after the preview edge %s is %+v", after[i].ID, after[i])
		}
		p.serve(i)
	}
	// The address that was tried can be had by others.
	if err := harness.Get(t.Context(), p.Client(t, p.addresses[0], false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
		t.Error(err)
	}
}
