package interop

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
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

// record is a line of the access log, as far as tests look at it.
type record struct {
	Message  string `json:"msg"`
	Host     string `json:"host"`
	Path     string `json:"path"`
	SNI      string `json:"sni"`
	Protocol string `json:"protocol"`
	Status   int    `json:"status"`
	Reason   string `json:"reason"`
	BytesIn  int64  `json:"bytes_in"`
	BytesOut int64  `json:"bytes_out"`
}

// records are those of the access log that a condition picks.
func (s *site) records(pick func(record) bool) []record {
	s.TB.Helper()
	file, err := os.Open(s.edge.AccessLog)
	if err != nil {
		s.TB.Fatal(err)
	}
	defer file.Close()
	var picked []record
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var r record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			continue // the end of the file may be half a line
		}
		if pick(r) {
			picked = append(picked, r)
		}
	}
	return picked
}

// logged waits for the one record of a path, and returns it.
func (s *site) logged(t *testing.T, path string) record {
	t.Helper()
	var found []record
	harness.Settle(t, func() error {
		if found = s.records(func(r record) bool { return r.Path == path }); len(found) != 1 {
			return fmt.Errorf("%d records of %s in the access log, want 1: %+v", len(found), path, found)
		}
		return nil
	})
	if len(found) == 0 {
		return record{}
	}
	return found[0]
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

// raw is a TLS connection to the edge.
func (s *site) raw(t *testing.T, alpn string) *tls.Conn {
	t.Helper()
	config := s.ClientTLS()
	config.NextProtos = []string{alpn}
	conn, err := tls.Dial("tcp", s.address, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(soon())
	return conn
}

// goWith is a launcher of a Go server with a handler.
func goWith(handler http.Handler) func(context.Context, peers.Options) (*peers.Backend, error) {
	return func(_ context.Context, o peers.Options) (*peers.Backend, error) { return peers.GoWith(o, handler) }
}
