package backend

import (
	"crypto/tls"
	"io"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestTunnel(t *testing.T) {
	s := serveRaw(t, func(c *serverConn) {
		io.WriteString(c, "220 ready\n") // a server that speaks first
		io.Copy(c, c)
		c.Conn.CloseWrite()
	})
	x := newBench(t, []string{closedPort(t), s.addr}, protocol(resealv1.BackendPool_PROTOCOL_TCP), func(p *resealv1.BackendPool) {
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
	})
	for range 4 {
		call := newCall()
		tunnel, err := x.Tunnel(t.Context(), call)
		if err != nil {
			t.Fatal(err)
		}
		if call.Protocol != "tcp" || call.Reused || call.Connect == 0 {
			t.Errorf("%+v", call)
		}
		io.WriteString(tunnel, "over and out\n")
		if err := tunnel.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(tunnel); err != nil || string(got) != "220 ready\nover and out\n" {
			t.Fatalf("%q %v", got, err)
		}
		tunnel.Close()
	}
	x.stop()
	if x.tally.requests != 4 || x.tally.kinds[notifyBoth] != 4 {
		t.Errorf("%d requests, ends %v", x.tally.requests, x.tally.kinds)
	}
}

// What either side sends before the tunnel is open goes through it, after the word
// that it is.
func TestTunnelTakesEarlyBytes(t *testing.T) {
	s := serveRaw(t, func(c *serverConn) {
		io.WriteString(c, "ready, ")
		io.Copy(c, c)
		c.Conn.CloseWrite()
	})
	s.tls.MaxVersion = tls.VersionTLS12 // so that "ready" comes with the end of the handshake
	x := newBench(t, []string{s.addr}, protocol(resealv1.BackendPool_PROTOCOL_TCP))
	l := x.Loops.Loops()[0]
	n := &noted{begun: make(chan struct{}, 1), ended: make(chan struct{})}
	l.Post(func() {
		flow := x.b.Tunnel(l, newCall(), n)
		flow.Data([]byte("early "), false)
		flow.Data([]byte("bytes"), false)
		flow.End(nil)
	})
	<-n.ended
	if string(n.data) != "ready, early bytes" || n.status != 101 || n.failed != nil {
		t.Errorf("%d, %q, %v", n.status, n.data, n.failed)
	}
}

func TestTunnelIdles(t *testing.T) {
	s := serveRaw(t, drainConn)
	x := newBench(t, []string{s.addr}, protocol(resealv1.BackendPool_PROTOCOL_TCP),
		timeouts(func(b *resealv1.BackendTimeouts) { b.Idle = dur(30 * time.Millisecond) }))
	tunnel, err := x.Tunnel(t.Context(), newCall())
	if err != nil {
		t.Fatal(err)
	}
	_, err = tunnel.Read(make([]byte, 1))
	wantReason(t, err, ReasonTimeoutIdle, 504)
	tunnel.Close()
}
