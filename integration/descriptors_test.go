package integration

import (
	"crypto/tls"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// TestControlPlaneOutOfDescriptors: whoever opens more connections than the control
// plane has descriptors, to its services and its page, takes none from the edges,
// the operators and the store, and when they are gone all is as before.
func TestControlPlaneOutOfDescriptors(t *testing.T) {
	const descriptors = 320
	w := newWorld(t)
	backend := w.Launch(t, peers.Go, peers.Options{})
	control := w.StartControlPlaneWithin(descriptors)
	edge := w.StartEdge("one", "")
	address := w.Address()
	revision := w.Apply(harness.Certificate("site", w.Pair) + harness.Listener("web", address, "", "  pool: app\n") + w.Pool("app", []*peers.Backend{backend}, ""))
	w.WaitAcked(revision, edge)

	var crowd []net.Conn
	defer func() {
		for _, c := range crowd {
			c.Close()
		}
	}()
	for i := range 2 * descriptors {
		c, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", []string{control.Address, control.Page}[i%2])
		if err != nil {
			continue // its backlog is full
		}
		crowd = append(crowd, c)
		if i%4 == 0 { // as a caller would that enrols
			secured := tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13})
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			_ = secured.HandshakeContext(t.Context()) // it may be ended for a newer one
		}
	}
	// Enough changes for the store to open files.
	for i := range 30 {
		revision = w.Apply(w.Pool("app", []*peers.Backend{backend}, fmt.Sprintf("  timeouts: {responseHeader: %ds}\n", 10+i)))
		if edge.Metrics().Sum("reseal_feed_connected") != 1 {
			t.Fatal("the edge has lost its stream")
		}
	}
	w.WaitAcked(revision, edge)
	w.StartEdge("two", "") // gets in
	for _, c := range crowd {
		c.Close()
	}
	if writable := control.Metrics().Sum("reseal_store_writable"); writable != 1 {
		t.Errorf("reseal_store_writable is %v", writable)
	}
}
