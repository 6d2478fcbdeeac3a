package interop

import (
	"net"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// site is a fleet of one edge with a listener "web".
type site struct {
	*harness.Site
	edge    *harness.Edge
	address string
}

// newSite starts one. Listener is further lines of the listener's spec.
func newSite(t *testing.T, listener string) *site {
	t.Helper()
	return newSiteOf(harness.New(t), listener)
}

func newSiteOf(fleet *harness.Fleet, listener string) *site {
	fleet.TB.Helper()
	s := &site{Site: harness.NewSite(fleet)}
	s.StartControlPlane()
	s.edge = s.StartEdge("one", "")
	s.address = s.Address()
	s.WaitAcked(s.Apply(harness.Certificate("site", s.Pair)+harness.Listener("web", s.address, "", listener)), s.edge)
	return s
}

// host is the name under which clients reach the pool of a name.
func host(pool string) string { return pool + "." + harness.SiteName }

// pool puts a pool into force, with further lines of its spec, and a route that
// leads there from its host.
func (s *site) pool(name string, backends []*peers.Backend, more string) {
	s.TB.Helper()
	s.WaitAcked(s.Apply(s.Pool(name, backends, more)+harness.Route(name, "web", host(name), name, "")), s.edge)
}

// soon is a deadline that only what hangs does not keep.
func soon() time.Time { return time.Now().Add(30 * time.Second) }

func port(t *testing.T, address string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return port
}
