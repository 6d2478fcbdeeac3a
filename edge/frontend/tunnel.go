package frontend

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

var errTunnelIdle = errors.New("no byte in either direction for too long")

// switchProtocols passes a 101 response on and then bytes.
func (q *request) switchProtocols(response *http.Response) {
	backend, ok := response.Body.(io.ReadWriteCloser)
	if q.upgrade == "" || !ok || !strings.EqualFold(response.Header.Get("Upgrade"), q.upgrade) {
		q.fail(http.StatusBadGateway, "protocol_error")
		return
	}
	if q.timer != nil && !q.timer.Stop() {
		q.fail(http.StatusGatewayTimeout, "timeout_request")
		return
	}
	header := response.Header.Clone()
	removeHopByHop(header)
	edit(header, q.match.ResponseHeaders)
	header.Set("Connection", "Upgrade")
	header.Set("Upgrade", response.Header.Get("Upgrade"))
	asWritten(header, q.x.ResponseNames)

	conn, buffered, err := q.control.Hijack()
	if err != nil {
		q.err = err
		q.fail(http.StatusInternalServerError, "internal")
		return
	}
	defer conn.Close()
	q.client.guard.hijacked()
	q.status = http.StatusSwitchingProtocols
	_ = conn.SetDeadline(time.Time{}) // fails only on a closed connection
	fmt.Fprint(buffered, "HTTP/1.1 101 Switching Protocols\r\n")
	_ = header.Write(buffered) // errors stay in the writer until Flush
	fmt.Fprint(buffered, "\r\n")
	if err := buffered.Flush(); err != nil {
		q.reason, q.err = "client_abort", err
		return
	}
	relay := &relay{
		client: q.client.guard.Conn, fromClient: buffered.Reader, backend: backend,
		idle: q.handler.generation.settings.idle,
	}
	relay.run()
	relay.cut(q.client)
	q.received, q.sent = relay.in.Load(), relay.out.Load()
	q.reason, q.err = relay.reason(q.client)
}

// tunnel serves a connection of protocol tls.
func (s *slot) tunnel(c *clientConn, conn *tls.Conn) {
	defer conn.Close()
	started := time.Now()
	st := s.state.Load()
	t := &tunnelRecord{x: exchange.Exchange{Client: c.id, First: true, Gone: c.gone, Source: c.source}}
	defer func() {
		if bug := recover(); bug != nil {
			s.panicked("a tunnel", bug)
			t.status, t.reason, t.err = http.StatusInternalServerError, "internal", fmt.Errorf("panic: %v", bug)
			c.reset()
		}
		duration := time.Since(started)
		s.answered(t.status, false, duration)
		s.logTunnel(c, t, duration)
	}()
	if match, ok := st.Route(c.sni, ""); ok {
		t.match = match
		s.relay(c, conn, st, t)
	} else {
		s.counters.Error("no_route")
		t.status, t.reason = http.StatusNotFound, "no_route"
	}
}

// tunnelRecord is what became of a connection of protocol tls.
type tunnelRecord struct {
	match   exchange.Match
	x       exchange.Exchange
	status  int // 0 when a tunnel was made
	reason  string
	err     error
	in, out int64
}

func (s *slot) relay(c *clientConn, conn *tls.Conn, st *state, t *tunnelRecord) {
	t.x.Pool = t.match.Pool
	if c.sni != "" && st.AllowsHost(c.sni) {
		t.x.ServerName = c.sni
	}
	// Ends the dial when the connection is closed to end a drain.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer c.onClose(cancel)()
	backend, err := s.frontend.cfg.Upstream.Tunnel(ctx, &t.x)
	if err != nil {
		t.status, t.reason, t.err = http.StatusBadGateway, "upstream_error", err
		var known interface {
			HTTPStatus() (code int, reason string)
		}
		if c.aborted.Load() {
			t.status, t.reason = http.StatusServiceUnavailable, "drain_timeout"
		} else if errors.As(err, &known) {
			t.status, t.reason = known.HTTPStatus()
		}
		return
	}
	relay := &relay{client: conn, fromClient: conn, backend: backend, idle: st.settings().idle}
	relay.run()
	relay.cut(c)
	t.in, t.out = relay.in.Load(), relay.out.Load()
	t.reason, t.err = relay.reason(c)
}

// relay copies bytes both ways until both have ended, one has failed, or none
// moved for the idle time.
type relay struct {
	client     *tls.Conn
	fromClient io.Reader // client, or what is buffered of it
	backend    io.ReadWriteCloser
	idle       time.Duration

	in, out atomic.Int64 // bytes from the client, to the client
	moved   atomic.Int64 // Unix ns of the last byte

	once sync.Once
	side side // that failed
	err  error
}

type side int

const (
	nobody side = iota
	theClient
	theBackend
	theClock
	theBug
)

func (r *relay) run() {
	defer r.backend.Close()
	r.moved.Store(time.Now().UnixNano())
	ctx, cancel := context.WithCancel(context.Background())
	var both sync.WaitGroup
	both.Go(func() { r.watch(ctx) })
	var copying sync.WaitGroup
	copying.Go(func() { r.toBackend() })
	r.toClient()
	copying.Wait()
	cancel()
	both.Wait()
}

// watch ends the relay when nothing moves.
func (r *relay) watch(ctx context.Context) {
	timer := time.NewTimer(r.idle)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		left := r.idle - time.Since(time.Unix(0, r.moved.Load()))
		if left <= 0 {
			r.fail(theClock, errTunnelIdle)
			return
		}
		timer.Reset(left)
	}
}

func (r *relay) toBackend() {
	r.copy(r.backend, r.fromClient, &r.in, theClient, theBackend, func() error {
		if half, ok := r.backend.(interface{ CloseWrite() error }); ok {
			return half.CloseWrite()
		}
		return r.backend.Close()
	})
}

func (r *relay) toClient() {
	r.copy(r.client, r.backend, &r.out, theBackend, theClient, r.client.CloseWrite)
}

// copy moves bytes one way. At their end it half-closes the other side.
func (r *relay) copy(dst io.Writer, src io.Reader, count *atomic.Int64, from, to side, end func() error) {
	defer func() {
		if bug := recover(); bug != nil {
			clientOf(r.client).slot.panicked("a tunnel", bug)
			r.fail(theBug, fmt.Errorf("panic: %v", bug))
		}
	}()
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	for {
		n, err := src.Read(buffer[:])
		if n > 0 {
			r.moved.Store(time.Now().UnixNano())
			written, writeErr := dst.Write(buffer[:n])
			count.Add(int64(written))
			if writeErr != nil {
				r.fail(to, writeErr)
				return
			}
			r.moved.Store(time.Now().UnixNano())
		}
		if errors.Is(err, io.EOF) && from == theClient && clientOf(r.client).peerClosed.Load() {
			err = io.ErrUnexpectedEOF // crypto/tls is lenient: TCP ended without close_notify
		}
		if errors.Is(err, io.EOF) {
			if err := end(); err != nil {
				r.fail(to, err)
			}
			return
		}
		if err != nil {
			r.fail(from, err)
			return
		}
	}
}

// fail ends both directions. The first failure counts.
func (r *relay) fail(by side, err error) {
	r.once.Do(func() {
		r.side, r.err = by, err
		_ = r.client.SetDeadline(time.Unix(1, 0)) // in the past: ends Read and Write
		_ = r.backend.Close()
	})
}

// cut resets the client's connection when the backend's has failed, so that the
// client does not take a part for the whole.
func (r *relay) cut(c *clientConn) {
	if r.side == theBackend || r.side == theBug {
		c.reset()
	}
}

// reason says why the relay ended early, after run. It is "" when both sides
// closed in order.
func (r *relay) reason(c *clientConn) (string, error) {
	var known interface {
		HTTPStatus() (code int, reason string)
	}
	switch {
	case r.side == nobody:
		return "", nil
	case c.aborted.Load():
		return "drain_timeout", r.err
	case r.side == theClock:
		return "timeout_idle", r.err
	case r.side == theClient && errors.Is(r.err, os.ErrDeadlineExceeded):
		return "client_stalled", r.err
	case r.side == theClient:
		return "client_abort", r.err
	case r.side == theBug:
		return "internal", r.err
	case errors.As(r.err, &known):
		_, reason := known.HTTPStatus()
		return reason, r.err
	default:
		return "reset", r.err
	}
}
