package frontend

import (
	"context"
	"crypto/tls"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxGrace bounds how long a drain leaves keep-alive connections open. In that
// time those that are busy end with a "Connection: close", and a request that is
// just being sent is still served.
const maxGrace = 250 * time.Millisecond

// generation is a server with settings that don't change, and the connections
// that it serves.
type generation struct {
	slot     *slot
	settings settings
	server   *http.Server // nil for protocol tls
	queue    *connQueue
	started  sync.Once
	leaving  atomic.Bool // clients are asked to go

	mu     sync.Mutex
	conns  map[*clientConn]struct{}
	sealed bool          // takes no further connections
	empty  chan struct{} // closed when sealed and without connections
}

func newGeneration(s *slot, with settings, leaving bool) *generation {
	g := &generation{
		slot: s, settings: with, queue: newConnQueue(),
		conns: map[*clientConn]struct{}{}, empty: make(chan struct{}),
	}
	g.leaving.Store(leaving)
	if with.protocol != resealv1.Listener_PROTOCOL_TLS {
		g.server = g.newServer()
	}
	return g
}

func (g *generation) newServer() *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	server := &http.Server{
		Handler:                      &handler{generation: g},
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            g.settings.header,
		IdleTimeout:                  g.settings.idle,
		// The handler enforces the bound itself and can answer with 431. Beyond
		// twice as much, net/http ends the connection.
		MaxHeaderBytes: 2 * g.settings.maxHeaderBytes,
		Protocols:      &protocols,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: g.settings.maxConcurrentStreams,
			SendPingTimeout:      g.settings.idle,
			WriteByteTimeout:     writeBound(g.settings.idle),
		},
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, clientKey{}, clientOf(conn))
		},
		ConnState: func(conn net.Conn, state http.ConnState) {
			switch state {
			case http.StateActive, http.StateHijacked:
				clientOf(conn).setActive(true)
			case http.StateNew, http.StateIdle:
				clientOf(conn).setActive(false)
			}
		},
		ErrorLog: slog.NewLogLogger(g.slot.frontend.cfg.Logger.Handler(), slog.LevelDebug),
	}
	serveHTTP2(server)
	return server
}

// clientKey is the context key of a request's *clientConn.
type clientKey struct{}

// clientOf is the client's connection beneath TLS.
func clientOf(conn net.Conn) *clientConn {
	switch conn := conn.(type) {
	case *guard:
		return conn.client
	case *h2Conn:
		return conn.client
	}
	return conn.(*tls.Conn).NetConn().(*clientConn)
}

// deliver hands a connection to the server. It reports false when the server
// takes none any more.
func (g *generation) deliver(conn *tls.Conn) bool {
	g.started.Do(func() {
		g.slot.frontend.work.Go(func() { _ = g.server.Serve(g.queue) }) // ends with the queue
	})
	if conn.ConnectionState().NegotiatedProtocol == "h2" {
		return g.queue.deliver(conn) // net/http wants it bare
	}
	client := clientOf(conn)
	client.guard = newGuard(conn, client, g.settings)
	return g.queue.deliver(client.guard)
}

// add reports false when the generation is sealed.
func (g *generation) add(c *clientConn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sealed {
		return false
	}
	g.conns[c] = struct{}{}
	c.generation.Store(g)
	return true
}

func (g *generation) remove(c *clientConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.conns[c]; !ok {
		return
	}
	delete(g.conns, c)
	if g.sealed && len(g.conns) == 0 {
		g.finish()
	}
}

// seal lets no further connections in. g must not be its slot's current one.
func (g *generation) seal() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sealed {
		return
	}
	g.sealed = true
	if len(g.conns) == 0 {
		g.finish()
	}
}

func (g *generation) finish() {
	close(g.empty)
	g.slot.emptied(g)
}

// retire lets the connections live on until their clients end them.
func (g *generation) retire() {
	g.seal()
	_ = g.queue.Close() // never fails
}

// drain asks clients to leave, waits for that up to timeout, and then closes
// what is left.
func (g *generation) drain(timeout time.Duration) {
	g.leaving.Store(true)
	g.seal()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if !g.wait(min(timeout/4, maxGrace)) && g.server != nil {
		_ = g.server.Shutdown(ctx) // fails only when ctx ends, which abort handles
	}
	_ = g.queue.Close() // never fails
	select {
	case <-g.empty:
		return
	case <-ctx.Done():
	}
	g.abort()
	<-g.empty
}

// wait reports whether the generation emptied within d.
func (g *generation) wait(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-g.empty:
		return true
	case <-timer.C:
		return false
	}
}

// abort closes all connections.
func (g *generation) abort() {
	left := g.connections()
	if len(left) > 0 {
		g.slot.frontend.cfg.Logger.Warn("closing connections that outlasted the drain", "listener", g.slot.name, "connections", len(left))
	}
	abort(left)
}

func (g *generation) connections() []*clientConn {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.conns))
}

// abort closes connections at the end of a drain.
func abort(left []*clientConn) {
	for _, c := range left {
		c.aborted.Store(true)
		_ = c.Close() // without close_notify, since a client that does not read would hold it up
	}
}

// connQueue is a net.Listener of connections whose handshake is done.
type connQueue struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newConnQueue() *connQueue {
	return &connQueue{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (q *connQueue) deliver(conn net.Conn) bool {
	select {
	case q.conns <- conn:
		return true
	case <-q.closed:
		return false
	}
}

// Accept implements net.Listener.
func (q *connQueue) Accept() (net.Conn, error) {
	select {
	case conn := <-q.conns:
		return conn, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (q *connQueue) Close() error {
	q.once.Do(func() { close(q.closed) })
	return nil
}

// Addr implements net.Listener.
func (q *connQueue) Addr() net.Addr { return &net.TCPAddr{} }
