package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
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

	crowd, disperse := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer disperse()
	for range descriptors {
		running.Go(func() { occupy(crowd, control.Page) })
	}
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for i := range descriptors {
		c, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", control.Address)
		if err != nil {
			continue // its backlog is full
		}
		conns = append(conns, c)
		if i%2 == 0 { // as a caller would that enrols
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
	disperse()
	running.Wait()
	if writable := control.Metrics().Sum("reseal_store_writable"); writable != 1 {
		t.Errorf("reseal_store_writable is %v", writable)
	}
}

// occupy holds a connection on which nothing is said, and opens another when it is
// ended, until ctx ends.
func occupy(ctx context.Context, address string) {
	for ctx.Err() == nil {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { c.Close() })
			_, _ = c.Read(make([]byte, 1))
			stop()
			c.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}
