package loop

import (
	"bytes"
	"crypto/tls"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// chaos is a handler that does at random all that a handler may do, and checks what
// it is told. Its state goes with the connection from loop to loop, without locks.
type chaos struct {
	t      *testing.T
	g      *Group
	random *rand.Rand
	want   []byte // what the peer may send
	got    int
	opens  int
	moves  int
	peer   bool // PeerEnded was called
	closed bool
	on     *Loop
	ended  chan<- Ending
}

// next is the handler after a move: the old one must hear nothing more.
func (h *chaos) next() *chaos {
	heir := *h
	heir.opens, heir.on = 0, nil
	heir.moves++
	h.closed = true
	return &heir
}

func (h *chaos) check(c *Conn, what string) bool {
	if h.closed || h.opens != 1 || c.Loop() != h.on {
		h.t.Errorf("%s: closed or moved %t, %d times opened, on its loop %t", what, h.closed, h.opens, c.Loop() == h.on)
	}
	return !h.closed
}

func (h *chaos) Open(c *Conn) {
	h.opens++
	h.on = c.Loop()
	h.check(c, "Open")
	c.Resume()
}

func (h *chaos) Data(c *Conn, p []byte) {
	if !h.check(c, "Data") {
		return
	}
	if h.peer || c.Paused() || len(p) == 0 || h.got+len(p) > len(h.want) || !bytes.Equal(p, h.want[h.got:h.got+len(p)]) {
		h.t.Errorf("after %d of %d bytes came %d others, paused %t, peer ended %t", h.got, len(h.want), len(p), c.Paused(), h.peer)
	}
	h.got += len(p)
	h.act(c, p)
}

func (h *chaos) act(c *Conn, p []byte) {
	switch h.random.IntN(24) {
	case 0, 1, 2:
		c.Pause()
		c.Timer(func() {
			if h.check(c, "a timer") {
				c.Resume()
			}
		}).Set(time.Duration(h.random.IntN(20)) * time.Millisecond)
	case 3, 4, 5:
		to := h.g.loops[h.random.IntN(len(h.g.loops))]
		c.Move(to, h.next())
	case 6:
		c.Write(make([]byte, h.random.IntN(100_000)))
	case 7:
		if h.random.IntN(4) == 0 {
			c.Close(Farewell{Within: time.Duration(h.random.IntN(3)) * 20 * time.Millisecond, FIN: h.random.IntN(2) == 0})
		}
	case 8:
		if h.random.IntN(10) == 0 {
			c.Abort()
		}
	case 9:
		if h.random.IntN(10) == 0 {
			panic("chaos")
		}
	case 10:
		if h.random.IntN(10) == 0 {
			c.CloseWrite()
		}
	default:
		c.Write(p)
	}
}

func (h *chaos) PeerEnded(c *Conn, _ bool) {
	h.check(c, "PeerEnded")
	if h.peer {
		h.t.Error("PeerEnded was called twice")
	}
	h.peer = true
	c.Close(Farewell{Within: 50 * time.Millisecond, FIN: true})
}

func (h *chaos) Writable(c *Conn) {
	if h.check(c, "Writable") {
		h.act(c, []byte("more"))
	}
}

func (h *chaos) Closed(c *Conn, end Ending) {
	if h.closed {
		h.t.Error("Closed was called twice, or after a move")
	}
	h.closed = true
	if end.PeerNotified && !end.Reset && h.peer && h.got != len(h.want) {
		h.t.Errorf("the peer ended in order, and %d of %d bytes came", h.got, len(h.want))
	}
	if c.Write([]byte("x")) || c.Open() {
		h.t.Error("it is open after Closed")
	}
	h.ended <- end
}

// TestChaos lets handlers and peers do what they like, at once: what handlers are told
// is in order and complete, each connection ends once, and nothing is left.
func TestChaos(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops, cfg.HighWater = 3, 32<<10
		cfg.Panicked = func(bug any, stack []byte) {
			if bug != "chaos" {
				t.Errorf("panic: %v\n%s", bug, stack)
			}
		}
		g := start(t, cfg)
		const connections = 30
		ended := make(chan Ending, connections)
		var peers sync.WaitGroup
		for i := range connections {
			random := rand.New(rand.NewPCG(4, uint64(i)))
			want := make([]byte, random.IntN(200_000))
			for j := range want {
				want[j] = byte(random.Uint32())
			}
			h := &chaos{t: t, g: g, random: rand.New(rand.NewPCG(5, uint64(i))), want: want, ended: ended}
			client, tcp := serve(t, g.Next(), []uint16{tls.VersionTLS12, tls.VersionTLS13}[i%2], h)
			_ = tcp.SetDeadline(time.Now().Add(patience))
			reads := random.IntN(4) > 0 // else it takes nothing
			if reads {
				peers.Go(func() { _, _ = io.Copy(io.Discard, client) })
			}
			peers.Go(func() {
				for rest := want; len(rest) > 0; {
					n := min(random.IntN(20_000)+1, len(rest))
					if _, err := client.Write(rest[:n]); err != nil {
						break
					}
					rest = rest[n:]
				}
				switch random.IntN(3) {
				case 0:
					_ = client.CloseWrite()
					_ = tcp.CloseWrite()
				case 1:
					_ = tcp.CloseWrite()
				case 2:
					_ = tcp.SetLinger(0)
					tcp.Close()
				}
				if !reads {
					time.Sleep(10 * time.Millisecond)
					tcp.Close()
				}
			})
		}
		for range connections {
			receive(t, ended, "Closed")
		}
		for _, l := range g.loops {
			eventually(t, l, "nothing to be left", func() bool {
				return len(l.conns) == 0 && l.Output() == 0 && l.Connections() == 0
			})
		}
		peers.Wait()
	})
}
