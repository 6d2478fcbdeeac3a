package loop

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// accepting returns what dials a connection that the group accepts.
func accepting(t *testing.T, g *Group) func() (client net.Conn, server net.Conn, to *Loop) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	acceptor := g.Acceptor(listener.(*net.TCPListener))
	t.Cleanup(func() {
		listener.Close()
		acceptor.Close()
		if conn, _, err := acceptor.Accept(); err == nil {
			conn.Close()
			t.Error("a closed Acceptor accepts")
		}
	})
	for _, l := range g.Loops() {
		on(t, l, func() {}) // it has begun
	}
	return func() (net.Conn, net.Conn, *Loop) {
		client, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		_ = client.(*net.TCPConn).SetReadBuffer(64 << 10)
		server, to, err := acceptor.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		if server.RemoteAddr().String() != client.LocalAddr().String() || server.LocalAddr().String() != client.RemoteAddr().String() {
			t.Fatalf("accepted %v at %v, dialled %v from %v", server.RemoteAddr(), server.LocalAddr(), client.RemoteAddr(), client.LocalAddr())
		}
		return client, server, to
	}
}

// TestAccepted: the handshake of an accepted connection is a goroutine's, and then
// the connection is a loop's, its own or another.
func TestAccepted(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		versions(t, func(t *testing.T, version uint16) {
			cfg.Loops = 2
			g := start(t, cfg)
			dial := accepting(t, g)
			for i := range 8 {
				raw, server, to := dial()
				if i%4 == 3 {
					to = g.Next()
				}
				wire, ended := NewWire(server), make(chan Ending, 1)
				client, ts := handshake(t, raw, wire, version)
				if i%2 == 0 { // what came before it joins
					if _, err := client.Write([]byte("early")); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Millisecond)
				}
				if err := to.Join(wire, ts, echo(ended)); err != nil {
					t.Fatal(err)
				}
				if i%2 == 1 {
					if _, err := client.Write([]byte("later")); err != nil {
						t.Fatal(err)
					}
				}
				// More than the kernel takes, so that the loop waits for room.
				content := bytes.Repeat([]byte("0123456789abcdef"), 256<<10)
				var sending sync.WaitGroup
				sending.Go(func() {
					if _, err := client.Write(content); err != nil {
						t.Error(err)
					}
				})
				got := make([]byte, 5+len(content))
				time.Sleep(10 * time.Millisecond)
				if _, err := io.ReadFull(client, got); err != nil || !bytes.Equal(got[5:], content) {
					t.Fatal("the echo is another: ", err)
				}
				sending.Wait()
				client.Close()
				if end := receive(t, ended, "the end"); !end.PeerNotified {
					t.Errorf("%+v", end)
				}
			}
			for _, l := range g.Loops() {
				eventually(t, l, "the loop to forget them", func() bool { return l.Connections() == 0 })
			}
		})
	})
}

// TestAcceptedUnjoined: before it joins, an accepted connection behaves as any
// net.Conn.
func TestAcceptedUnjoined(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops = 1
		g := start(t, cfg)
		dial := accepting(t, g)
		t.Run("deadline", func(t *testing.T) {
			_, server, _ := dial()
			_ = server.SetDeadline(time.Now().Add(10 * time.Millisecond))
			_, err := server.Read(make([]byte, 1))
			var timeout net.Error
			if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Error(err)
			}
		})
		t.Run("no room", func(t *testing.T) {
			client, server, _ := dial()
			content := make([]byte, 16<<20)
			var sending sync.WaitGroup
			sending.Go(func() {
				_ = server.SetWriteDeadline(time.Now().Add(patience))
				if n, err := server.Write(content); err != nil || n != len(content) {
					t.Error(n, err)
				}
			})
			time.Sleep(10 * time.Millisecond)
			if _, err := io.ReadFull(client, make([]byte, len(content))); err != nil {
				t.Error(err)
			}
			sending.Wait()
			_ = server.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
			if _, err := server.Write(content); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error(err)
			}
		})
		t.Run("the client has left", func(t *testing.T) {
			client, server, _ := dial()
			wire := NewWire(server)
			if wire.left() {
				t.Error("it has not")
			}
			client.Close()
			if _, err := server.Read(make([]byte, 1)); err != io.EOF {
				t.Error(err)
			}
			if !wire.left() {
				t.Error("it has")
			}
		})
		t.Run("closed", func(t *testing.T) {
			_, server, to := dial()
			time.AfterFunc(10*time.Millisecond, func() { server.Close() })
			if _, err := server.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
			if _, err := server.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
			if err := to.Join(NewWire(server), nil, echo(nil)); err == nil && !cfg.Goroutines {
				t.Error("it joined though it was closed")
			}
		})
	})
}

// TestAcceptedWhileLoopsEnd: nobody waits for what no loop tells.
func TestAcceptedWhileLoopsEnd(t *testing.T) {
	var server net.Conn
	reading := make(chan error, 1)
	t.Run("loops", func(t *testing.T) {
		g := start(t, Config{Loops: 1})
		_, server, _ = accepting(t, g)()
		go func() {
			_, err := server.Read(make([]byte, 1))
			reading <- err
		}()
		time.Sleep(10 * time.Millisecond)
	})
	if err := receive(t, reading, "the read to end"); err == nil {
		t.Error("it was read")
	}
}

// TestAcceptedAtOnce: connections come and go at once.
func TestAcceptedAtOnce(t *testing.T) {
	g := start(t, Config{Loops: 2})
	dial := accepting(t, g)
	var running sync.WaitGroup
	for i := range 200 {
		client, server, to := dial()
		running.Go(func() {
			defer client.Close()
			c := tls.Client(client, clientConfig(tls.VersionTLS13))
			switch i % 4 {
			case 0:
				client.Close()
			case 1:
				client.(*net.TCPConn).SetLinger(0)
				client.Close()
			default:
				if err := c.Handshake(); err == nil {
					_, _ = c.Write([]byte("x"))
					_, _ = io.ReadFull(c, make([]byte, 1))
				}
			}
		})
		running.Go(func() {
			wire := NewWire(server)
			s := tls.Server(wire, serverConfig(tls.VersionTLS13))
			if err := s.Handshake(); err != nil || i%4 == 3 {
				server.Close()
				return
			}
			if err := to.Join(wire, s, echo(nil)); err != nil {
				t.Error(err)
			}
		})
	}
	running.Wait()
	for _, l := range g.Loops() {
		eventually(t, l, "all to go", func() bool { return l.Connections() == 0 })
	}
}
