package loop

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// TestMove moves a connection around all the time while it echoes: nothing is lost,
// doubled or delivered on two loops.
func TestMove(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		versions(t, func(t *testing.T, version uint16) {
			cfg.Loops, cfg.HighWater = 3, 64<<10
			g := start(t, cfg)
			ended := make(chan Ending, 1)
			moves := 0
			var newHandler func() *funcs
			newHandler = func() *funcs {
				h := echo(ended)
				echoing := h.data
				h.open = func(c *Conn) {
					c.Resume()
					c.Timer(func() { t.Error("a timer fired after its connection had left") }).Set(time.Minute)
				}
				h.data = func(c *Conn, p []byte) {
					echoing(c, p)
					if moves++; moves%3 == 0 {
						c.Move(g.loops[moves%len(g.loops)], newHandler())
						if c.Open() || c.Write(p) {
							t.Error("the old handler still has it")
						}
					}
				}
				return h
			}
			client, _ := serve(t, g.Next(), version, newHandler())
			sent := make([]byte, 1<<20)
			_, _ = rand.NewChaCha8([32]byte{3}).Read(sent)
			var writing sync.WaitGroup
			writing.Go(func() {
				for rest := sent; len(rest) > 0; rest = rest[min(3000, len(rest)):] {
					if _, err := client.Write(rest[:min(3000, len(rest))]); err != nil {
						t.Error(err)
						return
					}
				}
				_ = client.CloseWrite()
			})
			got, err := io.ReadAll(client)
			writing.Wait()
			if err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("%d of %d bytes came back, %v", len(got), len(sent), err)
			}
			client.NetConn().Close()
			if end := receive(t, ended, "Closed"); end.Err != nil || !end.PeerNotified {
				t.Errorf("it ended with %+v", end)
			}
			total := 0
			for _, l := range g.loops {
				total += l.Connections()
				on(t, l, func() {
					if l.Output() != 0 || len(l.conns) != 0 {
						t.Errorf("a loop has %d bytes and %d connections left", l.Output(), len(l.conns))
					}
				})
			}
			if total != 0 {
				t.Errorf("%d connections are counted", total)
			}
		})
	})
}

// TestMoveIdle: an idle connection moves while its peer sends, ends, or resets at any
// moment: the new handler gets all of it.
func TestMoveIdle(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops = 2
		g := start(t, cfg)
		from, to := g.loops[0], g.loops[1]
		for round := range 60 {
			var conn *Conn
			opened := make(chan struct{})
			ended := make(chan Ending, 1)
			var got []byte
			moved := false
			old, heir := echo(ended), echo(ended)
			old.open = func(c *Conn) { conn = c; close(opened) }
			old.data = func(_ *Conn, p []byte) {
				if got = append(got, p...); moved {
					t.Error("the old handler was given data after Move")
				}
			}
			old.closed = func(_ *Conn, end Ending) {
				if ended <- end; moved {
					t.Error("the old handler was told of the end after Move")
				}
			}
			heir.data = func(_ *Conn, p []byte) { got = append(got, p...) }
			client := servePlain(t, from, old)
			receive(t, opened, "Open")
			go func() {
				time.Sleep(time.Duration(round%6) * 20 * time.Microsecond)
				_, _ = client.Write([]byte("hello"))
				if round%2 == 0 {
					client.Close()
				} else {
					_ = client.SetLinger(0)
					client.Close()
				}
			}()
			from.Post(func() {
				moved = conn.Open() // else it has ended before
				conn.Move(to, heir)
			})
			end := receive(t, ended, "Closed")
			if round%2 == 0 && (string(got) != "hello" || !end.FIN) || end.Reset != (round%2 == 1) {
				t.Fatalf("round %d: %q came, and it ended with %+v", round, got, end)
			}
		}
	})
}

// TestMoveToEnded: a connection that moves to a loop that has ended is closed, and the
// one who was to have it is told.
func TestMoveToEnded(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		var dead *Group
		t.Run("another group", func(t *testing.T) { dead = start(t, cfg) })
		g := start(t, cfg)
		ended := make(chan Ending, 1)
		servePlain(t, g.Next(), &funcs{
			open:   func(c *Conn) { c.Move(dead.Next(), echo(ended)) },
			closed: func(*Conn, Ending) { t.Error("the old handler was told") },
		})
		if end := receive(t, ended, "Closed"); end.Err != ErrStopped {
			t.Errorf("it ended with %+v", end)
		}
	})
}

// TestDescriptorsReused: connections end in the same rounds in which others come to
// their descriptors, and none gets what was another's.
func TestDescriptorsReused(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops = 1
		g := start(t, cfg)
		l := g.Next()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var serving sync.WaitGroup
		serving.Go(func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				// Echoes the first byte with the connection's own mark, then ends in one of
				// several ways.
				ends := 0
				h := &funcs{data: func(c *Conn, p []byte) {
					c.Write(p)
					switch ends++; p[0] % 3 {
					case 0:
						c.Close(Farewell{})
					case 1:
						c.Close(Farewell{Within: time.Second, FIN: true})
					}
				}}
				h.peerEnded = func(c *Conn, _ bool) { c.Abort() }
				if err := l.Join(NewWire(c), nil, h); err != nil {
					t.Error(err)
				}
			}
		})
		var clients sync.WaitGroup
		for i := range 8 {
			clients.Go(func() {
				for n := range 100 {
					c, err := net.Dial("tcp", listener.Addr().String())
					if err != nil {
						t.Error(err)
						return
					}
					message := []byte{byte(n), byte(i), byte(n >> 3)}
					_ = c.SetDeadline(time.Now().Add(patience))
					got := make([]byte, len(message))
					_, _ = c.Write(message)
					if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, message) {
						t.Errorf("%v came back for %v, %v", got, message, err)
					}
					c.Close()
				}
			})
		}
		clients.Wait()
		listener.Close()
		serving.Wait()
		eventually(t, l, "all connections to end", func() bool { return len(l.conns) == 0 })
	})
}
