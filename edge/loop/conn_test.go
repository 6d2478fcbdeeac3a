package loop

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestEcho sends messages of many sizes both ways at once, and then half-closes.
func TestEcho(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		versions(t, func(t *testing.T, version uint16) {
			g := start(t, cfg)
			ended := make(chan Ending, 1)
			client, _ := serve(t, g.Next(), version, echo(ended))
			sent := make([]byte, 1<<20)
			random := rand.NewChaCha8([32]byte{1})
			_, _ = random.Read(sent)
			go func() {
				for rest := sent; len(rest) > 0; {
					n := min(int(random.Uint64()%40_000)+1, len(rest))
					if _, err := client.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
				if err := client.CloseWrite(); err != nil {
					t.Error(err)
				}
			}()
			got, err := io.ReadAll(client)
			if err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("%d of %d bytes came back, equal: %t, %v", len(got), len(sent), bytes.Equal(got, sent), err)
			}
			client.NetConn().Close()
			end := receive(t, ended, "Closed")
			if want := (Ending{Notified: true, PeerNotified: true, FIN: true, ByPeer: true}); end != want {
				t.Errorf("it ended with %+v, want %+v", end, want)
			}
		})
	})
}

// TestEndings: what the peer did is told apart, whatever the poller.
func TestEndings(t *testing.T) {
	tests := []struct {
		name  string
		peer  func(c *tls.Conn, tcp *net.TCPConn)
		ended string // PeerEnded's argument, or "" when it is not called
		want  Ending
	}{
		{"close_notify and FIN", func(c *tls.Conn, tcp *net.TCPConn) { c.CloseWrite(); tcp.CloseWrite() }, "true",
			Ending{Notified: true, PeerNotified: true, FIN: true, ByPeer: true}},
		{"FIN alone", func(_ *tls.Conn, tcp *net.TCPConn) { tcp.CloseWrite() }, "false",
			Ending{Notified: true, FIN: true, ByPeer: true}},
		{"FIN within a record", func(_ *tls.Conn, tcp *net.TCPConn) {
			tcp.Write([]byte{23, 3, 3, 0, 100, 1, 2, 3})
			tcp.CloseWrite()
		}, "false", Ending{Notified: true, FIN: true, ByPeer: true}},
		{"RST", func(_ *tls.Conn, tcp *net.TCPConn) { tcp.SetLinger(0); tcp.Close() }, "",
			Ending{Reset: true, ByPeer: true}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			pollers(t, func(t *testing.T, cfg Config) {
				versions(t, func(t *testing.T, version uint16) {
					g := start(t, cfg)
					ended := make(chan Ending, 1)
					var told string
					h := echo(ended)
					inner := h.peerEnded
					h.peerEnded = func(c *Conn, notified bool) {
						told = fmt.Sprint(notified)
						inner(c, notified)
					}
					client, tcp := serve(t, g.Next(), version, h)
					test.peer(client, tcp)
					end := receive(t, ended, "Closed")
					end.Err = nil
					if end != test.want || told != test.ended {
						t.Errorf("it ended with %+v, PeerEnded(%s), want %+v and %s", end, told, test.want, test.ended)
					}
				})
			})
		})
	}
}

// TestBrokenRecord: a damaged record ends the connection, and the peer gets the
// alert rather than a RST.
func TestBrokenRecord(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		g := start(t, cfg)
		ended := make(chan Ending, 1)
		client, tcp := serve(t, g.Next(), tls.VersionTLS13, echo(ended))
		tcp.Write(append([]byte{23, 3, 3, 0, 40}, make([]byte, 40)...))
		end := receive(t, ended, "Closed")
		_, err := client.Read(make([]byte, 1))
		if err == nil || !strings.Contains(err.Error(), "remote error: tls: bad record MAC") || end.Err == nil || end.ByPeer {
			t.Errorf("ended with %+v, and the peer read %v", end, err)
		}
	})
}

// TestClose: Close sends what was written, waits for the peer's end, and gives up
// after its time.
func TestClose(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		for _, fin := range []bool{false, true} {
			for _, answers := range []bool{false, true} {
				t.Run(fmt.Sprintf("FIN %t, peer answers %t", fin, answers), func(t *testing.T) {
					g := start(t, cfg)
					ended := make(chan Ending, 1)
					h := echo(ended)
					within := patience
					if !answers {
						within = 50 * time.Millisecond
					}
					h.open = func(c *Conn) {
						c.Write([]byte("bye"))
						c.Close(Farewell{Within: within, FIN: fin})
						if c.Write([]byte("more")) || c.Open() {
							t.Error("it can be written to after Close")
						}
					}
					client, tcp := serve(t, g.Next(), tls.VersionTLS13, h)
					if !answers {
						end := receive(t, ended, "Closed")
						if want := (Ending{Notified: true, TimedOut: true}); end != want {
							t.Errorf("it ended with %+v", end)
						}
						return
					}
					got, err := io.ReadAll(client)
					if err != nil || string(got) != "bye" {
						t.Errorf("the peer read %q, %v", got, err)
					}
					if fin {
						if n, err := tcp.Read(make([]byte, 1)); err != io.EOF {
							t.Errorf("after close_notify came %d bytes, %v", n, err)
						}
					}
					client.Write(make([]byte, 100_000)) // is thrown away
					client.Close()
					end := receive(t, ended, "Closed")
					if want := (Ending{Notified: true, PeerNotified: true, FIN: true}); end != want {
						t.Errorf("it ended with %+v", end)
					}
				})
			}
		}
	})
}

// TestAbort: the peer gets RST.
func TestAbort(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		g := start(t, cfg)
		ended := make(chan Ending, 1)
		h := echo(ended)
		h.data = func(c *Conn, _ []byte) { c.Abort(); c.Abort() }
		client, _ := serve(t, g.Next(), tls.VersionTLS13, h)
		client.Write([]byte("x"))
		if _, err := client.Read(make([]byte, 1)); !wasReset(err) {
			t.Errorf("the peer read %v", err)
		}
		if end := receive(t, ended, "Closed"); end.Err != errAborted {
			t.Errorf("it ended with %+v", end)
		}
	})
}

// TestHandshakeReadsAhead: what the server's TLS has read beyond the handshake is
// not lost when nothing more comes.
func TestHandshakeReadsAhead(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		versions(t, func(t *testing.T, version uint16) {
			g := start(t, cfg)
			client, server := tcpPair(t)
			wire := NewWire(server)
			tc, ts := tls.Client(client, clientConfig(version)), tls.Server(wire, serverConfig(version))
			go func() {
				// In the same packets as the end of the handshake, as far as may be.
				tc.Write(bytes.Repeat([]byte("early "), 1000))
				tc.CloseWrite()
			}()
			if err := ts.Handshake(); err != nil {
				t.Fatal(err)
			}
			if version == tls.VersionTLS12 {
				// TLS may have read records on, which Read would show.
				one := make([]byte, 1)
				if _, err := ts.Read(one); err != nil {
					t.Fatal(err)
				}
			}
			var got []byte
			done := make(chan string, 1)
			h := &funcs{data: func(_ *Conn, p []byte) { got = append(got, p...) }}
			h.peerEnded = func(*Conn, bool) { done <- string(got) }
			if err := g.Next().Join(wire, ts, h); err != nil {
				t.Fatal(err)
			}
			all := receive(t, done, "the peer's end")
			if want := strings.Repeat("early ", 1000); !strings.HasSuffix(want, all) || len(want)-len(all) > 1 {
				t.Errorf("%d bytes came, of %d", len(all), len(want))
			}
		})
	})
}

// TestPause: what comes while paused stays with the kernel, up to one read, and all
// of it comes after Resume, with the end.
func TestPause(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		versions(t, func(t *testing.T, version uint16) {
			g := start(t, cfg)
			l := g.Next()
			var conn *Conn
			var got bytes.Buffer
			ended := make(chan struct{})
			client, _ := serve(t, l, version, &funcs{
				open: func(c *Conn) { conn = c },
				data: func(c *Conn, p []byte) {
					got.Write(p)
					c.Pause() // after each record
				},
				peerEnded: func(*Conn, bool) { close(ended) },
			})
			sent := make([]byte, 1<<20)
			_, _ = rand.NewChaCha8([32]byte{2}).Read(sent)
			var writing sync.WaitGroup
			writing.Go(func() {
				client.Write(sent)
				client.CloseWrite()
			})
			eventually(t, l, "the first record", func() bool { return got.Len() > 0 })
			on(t, l, func() {
				if got.Len() > maxPlaintext || conn.stats.In > 2*readSize {
					t.Errorf("%d bytes were delivered and %d read while paused", got.Len(), conn.stats.In)
				}
			})
			for {
				select {
				case <-ended:
					writing.Wait()
					if !bytes.Equal(got.Bytes(), sent) {
						t.Errorf("%d bytes came of %d", got.Len(), len(sent))
					}
					return
				default:
					on(t, l, func() { conn.Resume() })
				}
			}
		})
	})
}

// TestBackpressure: output for a peer that takes nothing is bounded, other
// connections of the loop go on, and all of it comes when the peer reads at last.
func TestBackpressure(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops, cfg.HighWater = 1, 100<<10
		g := start(t, cfg)
		l := g.Next()
		const total = 4 << 20
		piece := make([]byte, 10_000)
		var conn *Conn
		written, peak := 0, 0
		fill := func(c *Conn) {
			for written < total {
				n := min(len(piece), total-written)
				welcome := c.Write(piece[:n])
				written += n
				peak = max(peak, c.Buffered())
				if !welcome {
					return
				}
			}
			c.CloseWrite()
		}
		slow, _ := serve(t, l, tls.VersionTLS13, &funcs{
			open:     func(c *Conn) { conn = c; fill(c) },
			writable: fill,
		})
		eventually(t, l, "a peer that takes no more", func() bool { return conn != nil && conn.blocked && conn.full })
		quick, _ := serve(t, l, tls.VersionTLS13, echo(nil))
		began := time.Now()
		for range 100 {
			roundTrip(t, quick, "x")
		}
		t.Logf("100 messages beside it: %s", time.Since(began))
		got, err := io.Copy(io.Discard, slow)
		if err != nil || got != total {
			t.Errorf("%d bytes came, %v", got, err)
		}
		on(t, l, func() {
			if peak > cfg.HighWater+2*maxPlaintext || l.Output() != 0 {
				t.Errorf("at most %d bytes were buffered, at last %d", peak, l.Output())
			}
		})
	})
}

// TestBusyNeighbours: connections that send and take as fast as they can have no more
// of a round than their share.
func TestBusyNeighbours(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops, cfg.HighWater = 1, 128<<10
		g := start(t, cfg)
		l := g.Next()
		var busy sync.WaitGroup
		var clients []net.Conn
		for range 3 {
			client, _ := serve(t, l, tls.VersionTLS13, echo(nil))
			clients = append(clients, client.NetConn())
			busy.Go(func() { _, _ = io.Copy(io.Discard, client) })
			busy.Go(func() {
				for piece := make([]byte, 100_000); ; {
					if _, err := client.Write(piece); err != nil {
						return
					}
				}
			})
		}
		quick, _ := serve(t, l, tls.VersionTLS13, echo(nil))
		var trips []time.Duration
		for range 10 {
			began := time.Now()
			roundTrip(t, quick, "x")
			trips = append(trips, time.Since(began))
		}
		slices.Sort(trips)
		t.Logf("round trips: median %s, longest %s", trips[5], trips[9])
		if !raceEnabled && trips[5] > 50*time.Millisecond {
			t.Error("they hold others up")
		}
		on(t, l, func() {
			for _, c := range l.conns {
				if bound := 2*cfg.HighWater + readSize; c.Buffered() > bound {
					t.Errorf("%d bytes are buffered", c.Buffered())
				}
			}
		})
		for _, c := range clients {
			c.Close()
		}
		busy.Wait()
	})
}

// TestWriteAfterFull: a handler that had something left to write after it was told to
// stop is told that there is room all the same, also when the kernel takes what it
// wrote at once.
func TestWriteAfterFull(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops, cfg.HighWater = 1, 2*writeSize
		l := start(t, cfg).Loops()[0]
		opened, room := make(chan *Conn, 1), make(chan struct{}, 1)
		client := servePlain(t, l, &funcs{
			open:     func(c *Conn) { opened <- c },
			writable: func(*Conn) { room <- struct{}{} },
		})
		c := receive(t, opened, "Open")
		piece := make([]byte, writeSize)
		read := func(n int) {
			_ = client.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.CopyN(io.Discard, client, int64(n)); err != nil {
				t.Error(err)
			}
		}
		total := 0
		on(t, l, func() {
			for welcome := true; welcome; total += len(piece) {
				welcome = c.Write(piece)
			}
			// What the source would tell in the next round, before the other side of the
			// exchange brings the rest.
			if cfg.Goroutines {
				return
			}
			for c.Buffered() > 0 {
				read(total - c.Buffered())
				total = c.Buffered()
				c.writable()
				c.push()
			}
			if c.Write(piece[:1]) {
				t.Error("Write reported room, which Writable has not")
			}
			total++
		})
		read(total)
		receive(t, room, "Writable")
	})
}

// TestFloodingHandler: a handler that ignores backpressure loses the connection.
func TestFloodingHandler(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.HighWater = 64 << 10
		g := start(t, cfg)
		ended := make(chan Ending, 1)
		h := echo(ended)
		h.open = func(c *Conn) {
			for c.Open() {
				c.Write(make([]byte, 64<<10))
			}
		}
		serve(t, g.Next(), tls.VersionTLS13, h)
		if end := receive(t, ended, "Closed"); end.Err != errFlooded {
			t.Errorf("it ended with %+v", end)
		}
	})
}

// TestLoopOutput: a loop that holds much output holds less for each connection.
func TestLoopOutput(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops, cfg.LoopOutput = 1, 1<<20
		g := start(t, cfg)
		l := g.Next()
		piece := make([]byte, 8<<10)
		for range 20 {
			fill := func(c *Conn) {
				for c.Write(piece) {
				}
			}
			servePlain(t, l, &funcs{open: fill, writable: fill})
		}
		eventually(t, l, "all peers to be full", func() bool {
			for _, c := range l.conns {
				if !c.full || !c.source.busy() && !c.blocked {
					return false
				}
			}
			return len(l.conns) == 20
		})
		on(t, l, func() {
			if bound := 1<<20 + 256<<10 + 20*(crowded+len(piece)); l.Output() > bound {
				t.Errorf("%d bytes are buffered, more than %d", l.Output(), bound)
			}
		})
	})
}

// TestAnswerBeforeReset: a peer that answers and resets while much is being sent to it
// is heard: the failed write does not hide the answer.
func TestAnswerBeforeReset(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		g := start(t, cfg)
		l := g.Next()
		var got bytes.Buffer
		var conn *Conn
		ended := make(chan Ending, 1)
		client := servePlain(t, l, &funcs{
			open:   func(c *Conn) { conn = c; c.Pause() },
			data:   func(_ *Conn, p []byte) { got.Write(p) },
			closed: func(_ *Conn, end Ending) { ended <- end },
		})
		if _, err := client.Write([]byte("no, thanks")); err != nil {
			t.Fatal(err)
		}
		eventually(t, l, "the connection", func() bool { return conn != nil })
		on(t, l, func() { conn.Write([]byte("unread, so that closing resets")) })
		eventually(t, l, "the output to leave", func() bool { return conn.Buffered() == 0 && !conn.source.busy() })
		client.Close()
		for write := true; write; {
			on(t, l, func() {
				conn.Write([]byte("x"))
				write = conn.writeErr == nil && conn.phase == open
			})
		}
		on(t, l, func() { conn.Resume() })
		end := receive(t, ended, "Closed")
		if got.String() != "no, thanks" || !end.Reset || !end.ByPeer || end.Err == nil {
			t.Errorf("%q came, and it ended with %+v", got.String(), end)
		}
	})
}

// TestRoundIsShort: when much has come for many connections a round reads only so
// much of it, and what was posted runs in between.
func TestRoundIsShort(t *testing.T) {
	g := start(t, Config{Goroutines: true, Loops: 1})
	l := g.Next()
	const n = 200
	var conns []*Conn
	var most, total int
	for range n {
		a, b := net.Pipe()
		go func() { _, _ = a.Write(make([]byte, readSize)) }()
		t.Cleanup(func() { a.Close() })
		if err := l.Join(NewWire(b), nil, &funcs{
			open: func(c *Conn) { c.Pause(); conns = append(conns, c) },
			data: func(_ *Conn, p []byte) { total += len(p) },
		}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, l, "all connections", func() bool { return len(conns) == n })
	all := make(chan struct{})
	var look func(before int)
	look = func(before int) {
		if most = max(most, total-before); total == n*readSize {
			close(all)
			return
		}
		before = total
		l.Post(func() { look(before) })
	}
	on(t, l, func() {
		for _, c := range conns {
			// As if that much were there at once.
			c.source = &flood{source: c.source, left: readSize}
			c.readable = true
			c.Resume()
		}
		look(0)
	})
	receive(t, all, "all of it")
	on(t, l, func() {
		if most > 5<<20 {
			t.Errorf("%d bytes were read between two posted functions", most)
		}
		for _, c := range conns {
			c.source = c.source.(*flood).source
		}
	})
}

// flood is a source that has much to read.
type flood struct {
	source
	left int
}

func (f *flood) read(p []byte) (int, error) {
	n := min(len(p), f.left)
	f.left -= n
	return n, nil
}

// TestPanic: a panic ends its connection and no other.
func TestPanic(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops = 1
		bugs := make(chan any, 10)
		cfg.Panicked = func(bug any, stack []byte) {
			if !strings.Contains(string(stack), "conn_test.go") {
				t.Errorf("the stack does not show the bug:\n%s", stack)
			}
			bugs <- bug
		}
		g := start(t, cfg)
		ended := make(chan Ending, 1)
		h := echo(ended)
		h.data = func(*Conn, []byte) { panic("data") }
		bad, _ := serve(t, g.Next(), tls.VersionTLS13, h)
		good, _ := serve(t, g.Next(), tls.VersionTLS13, echo(nil))
		bad.Write([]byte("x"))
		if end := receive(t, ended, "Closed"); end.Err == nil || receive(t, bugs, "Panicked") != "data" {
			t.Errorf("it ended with %+v", end)
		}
		h = echo(ended)
		h.open = func(c *Conn) { c.Timer(func() { panic("timer") }).Set(0) }
		serve(t, g.Next(), tls.VersionTLS13, h)
		if end := receive(t, ended, "Closed"); end.Err == nil || receive(t, bugs, "Panicked") != "timer" {
			t.Errorf("it ended with %+v", end)
		}
		h = &funcs{closed: func(*Conn, Ending) { panic("closed") }, open: func(c *Conn) { c.Abort() }}
		serve(t, g.Next(), tls.VersionTLS13, h)
		g.Next().Post(func() { panic("posted") })
		if a, b := receive(t, bugs, "Panicked"), receive(t, bugs, "Panicked"); a == b || a != "closed" && a != "posted" {
			t.Errorf("the panics were %v and %v", a, b)
		}
		roundTrip(t, good, "goes on")
	})
}

// roundTrip sends a message and reads it back.
func roundTrip(t testing.TB, c net.Conn, message string) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, message); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != message {
		t.Fatalf("%q came back, %v", got, err)
	}
}

// TestByteByByte: a peer that sends single bytes delays nobody and is served.
func TestByteByByte(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		versions(t, func(t *testing.T, version uint16) {
			g := start(t, cfg)
			client, server := net.Pipe()
			tcp, served := tcpPair(t)
			wire := NewWire(served)
			// The client's bytes go through a relay that takes them apart.
			var relays sync.WaitGroup
			relays.Go(func() {
				one := make([]byte, 1)
				for {
					if _, err := io.ReadFull(server, one); err != nil {
						return
					}
					if _, err := tcp.Write(one); err != nil {
						return
					}
				}
			})
			relays.Go(func() { _, _ = io.Copy(server, tcp) })
			tc, ts := handshake(t, client, wire, version)
			if err := g.Next().Join(wire, ts, echo(nil)); err != nil {
				t.Fatal(err)
			}
			for range 5 {
				roundTrip(t, tc, strings.Repeat("one by one ", 10))
			}
			tc.NetConn().Close()
			tcp.Close()
			server.Close()
			relays.Wait()
		})
	})
}

// TestFakeTime: over goroutines a loop runs in testing/synctest, with timers and
// net.Pipe.
func TestFakeTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := start(t, Config{Goroutines: true, Loops: 1})
		client, server := net.Pipe()
		ended := make(chan Ending, 1)
		h := &funcs{closed: func(_ *Conn, end Ending) { ended <- end }}
		var idle *Timer
		h.open = func(c *Conn) {
			idle = c.Timer(func() { c.Close(Farewell{}) })
			idle.Set(time.Minute)
		}
		h.data = func(c *Conn, p []byte) { c.Write(p); idle.Set(time.Minute) }
		if err := g.Next().Join(NewWire(server), nil, h); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for range 10 {
			time.Sleep(50 * time.Second)
			if _, err := client.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		<-ended
		if took := time.Since(began); took < 560*time.Second || took > 560*time.Second+3*tick {
			t.Errorf("the idle time ended after %s", took)
		}
		client.Close()
	})
}

// TestStop: connections that are open when the group stops are closed, and their
// handlers are told; what comes later is refused.
func TestStop(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops = 2
		ended := make(chan Ending, 10)
		var g *Group
		t.Run("while it runs", func(running *testing.T) {
			g = start(running, cfg)
			for range 10 {
				client, _ := serve(t, g.Next(), tls.VersionTLS13, echo(ended))
				roundTrip(t, client, "x")
			}
		})
		for range 10 {
			if end := receive(t, ended, "Closed"); end.Err != ErrStopped {
				t.Errorf("it ended with %+v", end)
			}
		}
		_, server := tcpPair(t)
		if err := g.Next().Join(NewWire(server), nil, echo(nil)); err != ErrStopped {
			t.Errorf("Join after the end: %v", err)
		}
		if g.Next().Post(func() {}) || g.Next().Connections() != 0 {
			t.Error("a loop that has ended takes a function, or has connections")
		}
		if err := g.Run(t.Context()); err != ErrStopped {
			t.Errorf("a group that has ended runs again: %v", err)
		}
	})
}

// TestPost: functions run in order, also while the loop is busy or asleep.
func TestPost(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		g := start(t, cfg)
		l := g.Next()
		var wait sync.WaitGroup
		seen := make([]int, 4)
		for i := range seen {
			wait.Go(func() {
				for n := range 10_000 {
					l.Post(func() {
						if seen[i] != n {
							t.Errorf("function %d of %d came as number %d", n, i, seen[i])
						}
						seen[i]++
					})
				}
			})
		}
		wait.Wait()
		eventually(t, l, "all functions", func() bool { return seen[0]+seen[1]+seen[2]+seen[3] == 40_000 })
	})
}

// unwritable is a connection that can't be written to.
type unwritable struct{ net.Conn }

func (unwritable) Write([]byte) (int, error) { return 0, syscall.EPIPE }

// TestWriteThatFailsLater: a goroutine finds out that a write fails when it is
// thought to be done, and nothing else is to be written.
func TestWriteThatFailsLater(t *testing.T) {
	l := start(t, Config{Goroutines: true, Loops: 1}).Loops()[0]
	ours, theirs := net.Pipe()
	defer theirs.Close()
	ended := make(chan Ending, 1)
	if err := l.Join(NewWire(unwritable{ours}), nil, &funcs{
		open:   func(c *Conn) { c.Write([]byte("x")) },
		closed: func(_ *Conn, end Ending) { ended <- end },
	}); err != nil {
		t.Fatal(err)
	}
	if end := receive(t, ended, "Closed"); !errors.Is(end.Err, syscall.EPIPE) || !end.Reset {
		t.Errorf("ended by %+v", end)
	}
}

// TestWatch: FIN behind close_notify is told to who watches, whether it comes with it
// or later, and to nobody else.
func TestWatch(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		for _, watched := range []bool{true, false} {
			for _, apart := range []bool{true, false} {
				t.Run(fmt.Sprintf("watched=%v,apart=%v", watched, apart), func(t *testing.T) {
					l := start(t, cfg).Next()
					told, ended := make(chan string, 10), make(chan Ending, 1)
					client, tcp := serve(t, l, tls.VersionTLS13, &funcs{
						peerEnded: func(c *Conn, notified bool) {
							left := notified && watched && c.Watch()
							if told <- fmt.Sprint(notified); left {
								told <- "false"
							}
						},
						data:   func(c *Conn, p []byte) { c.Write(p) },
						closed: func(_ *Conn, end Ending) { ended <- end },
					})
					client.CloseWrite()
					if apart {
						if got := receive(t, told, "close_notify"); got != "true" {
							t.Errorf("PeerEnded(%s)", got)
						}
					}
					tcp.CloseWrite()
					if !apart {
						receive(t, told, "close_notify")
					}
					if watched {
						if got := receive(t, told, "FIN"); got != "false" {
							t.Errorf("PeerEnded(%s)", got)
						}
					}
					time.Sleep(20 * time.Millisecond)
					if len(told)+len(ended) > 0 {
						t.Error("more is told")
					}
				})
			}
		}
	})
}

// TestWatchReset: who watches learns of RST behind close_notify, also when both have
// come before the loop reads. Nothing more would come of such a connection.
func TestWatchReset(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		l := start(t, cfg).Next()
		left := make(chan struct{}, 2)
		client, tcp := serve(t, l, tls.VersionTLS13, &funcs{
			peerEnded: func(c *Conn, _ bool) {
				if c.Watch() {
					left <- struct{}{}
				}
			},
			closed: func(*Conn, Ending) { left <- struct{}{} },
		})
		on(t, l, func() {
			if err := errors.Join(client.CloseWrite(), tcp.SetLinger(0), tcp.Close()); err != nil {
				t.Error(err)
			}
			time.Sleep(20 * time.Millisecond)
		})
		receive(t, left, "the peer's leaving")
	})
}

// TestUnread puts bytes in front of the hello.
func TestUnread(t *testing.T) {
	client, server := tcpPair(t)
	hello := make(chan []byte, 1)
	go func() {
		first := make([]byte, 4096)
		n, _ := server.Read(first)
		hello <- first[:n]
	}()
	wire := NewWire(server)
	done := make(chan error, 1)
	go func() { done <- tls.Client(client, clientConfig(tls.VersionTLS13)).Handshake() }()
	came := receive(t, hello, "the hello")
	wire.Unread(came[10:])
	wire.Unread(came[:10])
	if wire.Ahead() != len(came) {
		t.Errorf("%d bytes ahead of %d", wire.Ahead(), len(came))
	}
	if err := tls.Server(wire, serverConfig(tls.VersionTLS13)).Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, done, "the client"); err != nil {
		t.Fatal(err)
	}
}
