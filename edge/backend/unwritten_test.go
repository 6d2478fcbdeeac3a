package backend

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
)

// deadConn is a connection of which nothing tells that it died, until a byte is to
// be written.
type deadConn struct {
	net.Conn
	dead atomic.Bool
}

func (c *deadConn) Write(p []byte) (int, error) {
	if c.dead.Load() {
		return 0, syscall.EPIPE
	}
	return c.Conn.Write(p)
}

// A request that found its connection dead before a byte of it was written is sent
// again with its body, even one that must not be repeated, and even when no
// retries are left.
func TestUnwrittenRequestsAreSentAgain(t *testing.T) {
	for name, body := range map[string]func() io.Reader{
		"no body":    func() io.Reader { return nil },
		"small body": func() io.Reader { return bytes.NewReader(pattern(100)) },
		"large body": func() io.Reader { return bytes.NewReader(pattern(100_000)) },
		"stream":     func() io.Reader { return io.MultiReader(bytes.NewReader(pattern(200_000))) },
	} {
		t.Run(name, func(t *testing.T) {
			var posts atomic.Int64
			s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				data, _ := io.ReadAll(r.Body)
				if r.Method == http.MethodPost {
					posts.Add(1)
				}
				_, _ = io.WriteString(w, digest(data))
			}))
			x := newBench(t, []string{s.addr}, retries(0))
			var first *deadConn
			x.b.cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
				if err == nil && first == nil {
					first = &deadConn{Conn: conn}
					conn = first
				}
				return conn, err
			}
			x.get("/")
			first.dead.Store(true)
			call := newCall()
			_, got := x.do(newRequest(t, "POST", "/", body()), call)
			var want []byte
			if source := body(); source != nil {
				want, _ = io.ReadAll(source)
			}
			if string(got) != digest(want) || posts.Load() != 1 || call.Attempts != 2 || call.Reused {
				t.Errorf("answer %q, want %q; %d POSTs arrived; %+v", got, digest(want), posts.Load(), call)
			}
		})
	}
}
