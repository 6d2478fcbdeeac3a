package tickets

import (
	"context"
	"io"
	"net"
	"sync"
)

// relay passes TCP connections on. Where it can't connect, its client is reset,
// as by a host where nobody listens.
type relay struct {
	listener net.Listener
	gate     *gate
	to       func(context.Context) (conn net.Conn, ended func(), err error)
	ctx      context.Context
	running  sync.WaitGroup
}

// newRelay serves a listener until it is closed. A nil gate is always open.
func newRelay(listener net.Listener, gate *gate, to func(context.Context) (net.Conn, func(), error)) (r *relay, end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	r = &relay{listener: listener, gate: gate, to: to, ctx: ctx}
	r.running.Go(r.serve)
	return r, func() {
		cancel()
		_ = listener.Close()
		r.running.Wait()
	}
}

func (r *relay) serve() {
	for {
		conn, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.running.Go(func() { r.pass(conn.(*net.TCPConn)) })
	}
}

func (r *relay) pass(client *net.TCPConn) {
	defer func() { _ = client.Close() }()
	if !r.gate.wait(r.ctx) {
		return
	}
	conn, ended, err := r.to(r.ctx)
	if err != nil {
		_ = client.SetLinger(0)
		return
	}
	defer ended()
	server := conn.(*net.TCPConn)
	defer func() { _ = server.Close() }()
	stop := context.AfterFunc(r.ctx, func() {
		_ = client.Close()
		_ = server.Close()
	})
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { r.copy(server, client) })
	r.copy(client, server)
	both.Wait()
}

// copy passes one direction on, with how it ended.
func (r *relay) copy(to, from *net.TCPConn) {
	var err error
	if r.gate == nil {
		_, err = io.Copy(to, from)
	} else {
		_, err = io.Copy(gated{to, r}, struct{ io.Reader }{from})
		if !r.gate.wait(r.ctx) {
			return
		}
	}
	if err == nil {
		_ = to.CloseWrite()
		return
	}
	_ = to.SetLinger(0)
	_ = to.Close()
	_ = from.Close()
}

// gated is a connection that takes nothing while the gate is shut.
type gated struct {
	to    *net.TCPConn
	relay *relay
}

func (g gated) Write(data []byte) (int, error) {
	if !g.relay.gate.wait(g.relay.ctx) {
		return 0, g.relay.ctx.Err()
	}
	return g.to.Write(data)
}

// gate cuts what passes it: nothing gets through while it is shut, neither bytes
// nor the end of a connection, as when a cable is pulled.
type gate struct {
	mu     sync.Mutex
	opened chan struct{} // closed while the gate is open
}

func newGate() *gate {
	g := &gate{opened: make(chan struct{})}
	close(g.opened)
	return g
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.opened = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.opened)
}

// wait returns false when ctx ended before the gate was open.
func (g *gate) wait(ctx context.Context) bool {
	if g == nil {
		return true
	}
	g.mu.Lock()
	opened := g.opened
	g.mu.Unlock()
	select {
	case <-opened:
		return true
	case <-ctx.Done():
		return false
	}
}
