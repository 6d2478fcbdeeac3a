package peers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Go starts a net/http server in this process. It serves all of the content.
func Go(_ context.Context, o Options) (*Backend, error) {
	return GoWith(o, Handler(o.CloseEach))
}

// GoWith starts a net/http server with the given handler in this process.
func GoWith(o Options, handler http.Handler) (*Backend, error) {
	if o.Mode == TLS12SessionIDs {
		return nil, fmt.Errorf("go: %s: %w: crypto/tls servers resume by ticket only", o.Mode, ErrMode)
	}
	if o.NoSessions {
		return nil, fmt.Errorf("go: without sessions: %w", ErrMode)
	}
	pair, err := o.issue()
	if err != nil {
		return nil, err
	}
	certificate, err := pair.TLS()
	if err != nil {
		return nil, err
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &goServer{counts: Counts{}, mode: o.Mode, closed: make(chan struct{}), accepted: make(chan net.Conn), inner: inner}
	s.config = &tls.Config{
		Certificates: []tls.Certificate{certificate},
		MinVersion:   o.Mode.Version(),
		MaxVersion:   o.Mode.Version(),
		NextProtos:   []string{"http/1.1"},
	}
	if o.SingleUse {
		spendTickets(s.config)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	if o.HTTP2 {
		protocols.SetHTTP2(true)
		s.config.NextProtos = []string{"h2", "http/1.1"}
	}
	s.http = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.add(func(c *Counts) { c.Requests++ })
			handler.ServeHTTP(w, r)
		}),
		Protocols:         protocols,
		TLSConfig:         s.config.Clone(),
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(&s.log, "", 0),
		ConnState:         s.connState,
	}
	s.running.Go(s.accept)
	s.running.Go(func() { _ = s.http.Serve(s) })
	name := "go-" + o.Mode.String()
	if o.HTTP2 {
		name = "go-h2-" + o.Mode.String()
	}
	return &Backend{
		Name: name, Address: inner.Addr().String(), Mode: o.Mode, paths: all(),
		counts: func(context.Context) (Counts, error) { return s.snapshot(), nil },
		output: s.log.String, stop: s.stop,
	}, nil
}

// spendTickets makes a server take each ticket once, and give none when it has.
func spendTickets(config *tls.Config) {
	var spent sync.Map
	base := config.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		own := base.Clone()
		own.UnwrapSession = func(ticket []byte, state tls.ConnectionState) (*tls.SessionState, error) {
			if _, seen := spent.LoadOrStore(string(ticket), true); seen {
				return nil, nil
			}
			own.SessionTicketsDisabled = true // read again before tickets are given
			return base.DecryptTicket(ticket, state)
		}
		own.WrapSession = base.EncryptTicket
		return own, nil
	}
}

// goServer makes handshakes before net/http sees the connection, so that they
// are counted whether or not a request follows. It is http.Server's listener.
type goServer struct {
	inner    net.Listener
	config   *tls.Config
	http     *http.Server
	mode     Mode
	log      syncBuffer
	running  sync.WaitGroup
	closing  sync.Once
	closed   chan struct{}
	accepted chan net.Conn

	mu     sync.Mutex
	counts Counts
}

func (s *goServer) add(change func(*Counts)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.counts)
}

func (s *goServer) snapshot() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts
}

func (s *goServer) accept() {
	for {
		conn, err := s.inner.Accept()
		if err != nil {
			return
		}
		s.add(func(c *Counts) { c.Connections++ })
		s.running.Go(func() { s.handshake(conn) })
	}
}

func (s *goServer) handshake(conn net.Conn) {
	raw := &rawConn{Conn: conn}
	tc := tls.Server(raw, s.config)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		s.add(func(c *Counts) { c.Failed++ })
		_ = conn.Close()
		return
	}
	resumed := tc.ConnectionState().DidResume
	s.add(func(c *Counts) {
		if resumed {
			c.setResumed(s.mode, c.Resumed()+1)
		} else {
			c.Full++
		}
	})
	select {
	case s.accepted <- tc:
	case <-s.closed:
		_ = conn.Close()
	}
}

// connState classifies the end of connections that the client ended.
func (s *goServer) connState(conn net.Conn, state http.ConnState) {
	if state != http.StateClosed {
		return
	}
	tc, ok := conn.(*tls.Conn)
	if !ok {
		return
	}
	raw := tc.NetConn().(*rawConn)
	s.add(func(c *Counts) {
		if raw.reset.Load() {
			c.Resets++
		}
		if raw.reset.Load() || raw.eof.Load() && !raw.notified.Load() {
			c.Unclean++
		}
	})
}

// Accept implements net.Listener.
func (s *goServer) Accept() (net.Conn, error) {
	select {
	case conn := <-s.accepted:
		return conn, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (s *goServer) Close() error {
	s.closing.Do(func() { close(s.closed) })
	return s.inner.Close()
}

// Addr implements net.Listener.
func (s *goServer) Addr() net.Addr { return s.inner.Addr() }

func (s *goServer) stop() error {
	_ = s.Close()
	err := s.http.Close()
	s.running.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// rawConn remembers how reading TCP ended, and whether the last record looked
// like close_notify: crypto/tls returns io.EOF with and without.
type rawConn struct {
	net.Conn
	eof, reset, notified atomic.Bool

	received direction // of the reader
}

func (c *rawConn) Read(data []byte) (int, error) {
	n, err := c.Conn.Read(data)
	c.received.follow(data[:n])
	c.notified.Store(c.received.notified)
	switch {
	case errors.Is(err, io.EOF):
		c.eof.Store(true)
	case errors.Is(err, syscall.ECONNRESET):
		c.reset.Store(true)
	}
	return n, err
}

// CloseWrite lets crypto/tls half-close.
func (c *rawConn) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }

// syncBuffer is a strings.Builder for several goroutines.
type syncBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *syncBuffer) Write(data []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(data)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
