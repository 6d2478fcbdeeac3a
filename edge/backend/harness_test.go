package backend

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/legtest"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority signs the certificates of all test servers.
var authority = sync.OnceValue(func() (ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}) {
	ca.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &ca.key.PublicKey, ca.key)
	if err != nil {
		panic(err)
	}
	ca.cert, _ = x509.ParseCertificate(der)
	ca.pool = x509.NewCertPool()
	ca.pool.AddCert(ca.cert)
	return ca
})

func certificate(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	ca := authority()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: names[0]},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: names,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

const testName = "backend.test"

// server is an HTTPS server that notes how its connections began and ended.
type server struct {
	t    testing.TB
	addr string
	tls  *tls.Config
	http *http.Server
	l    net.Listener

	full, resumed atomic.Int64 // handshakes
	opened        atomic.Int64
	open, maxOpen atomic.Int64
	mu            sync.Mutex
	ends          map[string]int // of connections that the client ended
	names         []string       // SNI of each connection
	conns         []*serverConn
}

// serverConn sees how a client ends its connection.
type serverConn struct {
	*tls.Conn
	raw   *rawConn
	s     *server
	once  sync.Once
	ended sync.Once
}

type rawConn struct {
	net.Conn
	fin atomic.Bool
}

func (r *rawConn) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	if err == io.EOF {
		r.fin.Store(true)
	}
	return n, err
}

func (c *serverConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.once.Do(func() { c.s.shaken(c) })
	if err != nil {
		c.end(err)
	}
	return n, err
}

func (c *serverConn) Close() error {
	c.end(net.ErrClosed)
	return c.Conn.Close()
}

// end notes how the connection ended, as seen first.
func (c *serverConn) end(err error) {
	var netErr net.Error
	if errors.As(err, &netErr) && netErr.Timeout() {
		return // net/http's background read
	}
	c.ended.Do(func() {
		how := "closed by server"
		switch {
		case errors.Is(err, syscall.ECONNRESET):
			how = "reset"
		case err == io.EOF && !c.raw.fin.Load():
			how = "close_notify"
		case err == io.EOF:
			how = "fin without notify"
		case !errors.Is(err, net.ErrClosed):
			how = err.Error()
		}
		c.s.mu.Lock()
		c.s.ends[how]++
		c.s.mu.Unlock()
		c.s.open.Add(-1)
	})
}

func (s *server) shaken(c *serverConn) {
	state := c.ConnectionState()
	if !state.HandshakeComplete {
		return
	}
	if state.DidResume {
		s.resumed.Add(1)
	} else {
		s.full.Add(1)
	}
	s.mu.Lock()
	s.names = append(s.names, state.ServerName)
	s.mu.Unlock()
}

// Accept implements net.Listener.
func (s *server) Accept() (net.Conn, error) {
	c, err := s.l.Accept()
	if err != nil {
		return nil, err
	}
	s.opened.Add(1)
	for n, m := s.open.Add(1), s.maxOpen.Load(); n > m && !s.maxOpen.CompareAndSwap(m, n); m = s.maxOpen.Load() {
	}
	raw := &rawConn{Conn: c}
	conn := &serverConn{Conn: tls.Server(raw, s.tls), raw: raw, s: s}
	s.mu.Lock()
	s.conns = append(s.conns, conn)
	s.mu.Unlock()
	return conn, nil
}

func (s *server) Close() error { return s.l.Close() }

func (s *server) Addr() net.Addr { return s.l.Addr() }

func listen(t testing.TB, names ...string) *server {
	t.Helper()
	if len(names) == 0 {
		names = []string{testName}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return &server{
		t: t, addr: l.Addr().String(), l: l, ends: map[string]int{},
		tls: &tls.Config{
			Certificates: []tls.Certificate{certificate(t, names...)},
			// The hybrid key exchange is slow under the race detector.
			CurvePreferences: []tls.CurveID{tls.X25519},
		},
	}
}

// serve starts an HTTP/1.1 server.
func serve(t testing.TB, handler http.Handler, names ...string) *server {
	s := listen(t, names...)
	s.http = &http.Server{Handler: handler, ErrorLog: nil}
	go s.http.Serve(s)
	t.Cleanup(func() { s.http.Close() })
	return s
}

// serveH2 starts an HTTP/2 server on net/http.
func serveH2(t testing.TB, handler http.Handler, configure ...func(*http.Server)) *server {
	s := listen(t)
	s.http = &http.Server{Handler: handler, TLSConfig: s.tls}
	s.http.TLSConfig.NextProtos = []string{"h2", "http/1.1"}
	for _, f := range configure {
		f(s.http)
	}
	go s.http.ServeTLS(&countingListener{s.l, s}, "", "")
	t.Cleanup(func() { s.http.Close() })
	return s
}

type countingListener struct {
	net.Listener
	s *server
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.s.opened.Add(1)
	}
	return c, err
}

// serveRaw runs handle on each TLS connection, which is closed after it.
func serveRaw(t testing.TB, handle func(c *serverConn)) *server {
	s := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := s.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c.(*serverConn))
			})
		}
	})
	t.Cleanup(func() {
		s.l.Close()
		s.mu.Lock()
		for _, c := range s.conns {
			c.raw.Close()
		}
		s.mu.Unlock()
		wg.Wait()
	})
	return s
}

// request reads one request of a raw server.
func request(br *bufio.Reader) (*http.Request, []byte, error) {
	req, err := http.ReadRequest(br)
	if err != nil {
		return nil, nil, err
	}
	body, err := io.ReadAll(req.Body)
	return req, body, err
}

// bench is a Backend with one pool "p", stopped at the end of the test, when
// gauges, counts and goroutines must have come to rest.
type bench struct {
	legtest.RoundTripper
	t     testing.TB
	b     *Backend
	tally *tally
	h     *fakeSessions
	spec  *resealv1.BackendPool
	pool  exchange.Pool
	end   func() // ends Run
	stop  func() // ends Run and checks what must hold then
}

type option func(*resealv1.BackendPool)

func newBench(t testing.TB, addresses []string, options ...option) *bench {
	t.Helper()
	spec := &resealv1.BackendPool{
		Tls: &resealv1.BackendTLS{ServerName: testName},
		// Some servers here never answer a close_notify.
		Connections: &resealv1.Connections{CloseTimeout: dur(200 * time.Millisecond)},
	}
	for _, a := range addresses {
		spec.Endpoints = append(spec.Endpoints, &resealv1.Endpoint{Address: a})
	}
	x := &bench{t: t, tally: newTally(), h: newFakeSessions(), spec: spec}
	stopLoops := x.run(Config{Handshaker: x.h, Counters: func(string) exchange.Counters { return x.tally }})
	x.set(options...)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- x.b.Run(ctx) }()
	x.end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	x.stop = sync.OnceFunc(func() {
		x.end()
		x.settled()
	})
	t.Cleanup(stopLoops)
	t.Cleanup(x.stop)
	return x
}

// run makes the Backend, and runs its loops until the function that it returns is
// called.
func (x *bench) run(cfg Config) (stop func()) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Loops = loop.New(loop.Config{Loops: 2, Panicked: func(bug any, stack []byte) { cfg.Logger.Error("panic", "panic", bug, "stack", string(stack)) }})
	x.b = New(cfg)
	x.RoundTripper = legtest.RoundTripper{Backend: x.b, Loops: cfg.Loops}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cfg.Loops.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			x.t.Error(err)
		}
	}
}

// settled checks what must hold after Run.
func (x *bench) settled() {
	x.t.Helper()
	x.tally.with(func() {
		c := x.tally
		if c.active != 0 || c.idle != 0 || c.opened != c.closed || c.opened != c.full+c.resumed {
			x.t.Errorf("after the end: %d active, %d idle, %d opened, %d closed, %d full, %d resumed",
				c.active, c.idle, c.opened, c.closed, c.full, c.resumed)
		}
	})
	for _, p := range *x.b.pools.Load() {
		for _, e := range p.state.Load().endpoints {
			if n := e.InFlight(); n != 0 {
				x.t.Errorf("%d requests in flight at %s", n, e.Address)
			}
			e.mu.Lock()
			if e.open != 0 || e.parting != 0 {
				x.t.Errorf("%d connections to %s are open, %d on their way out", e.open, e.Address, e.parting)
			}
			e.mu.Unlock()
		}
	}
}

// current is the pool of that name that requests see.
func (x *bench) current(name string) *pool { return (*x.b.pools.Load())[name] }

// set changes the spec and applies it.
func (x *bench) set(options ...option) {
	for _, o := range options {
		o(x.spec)
	}
	x.apply("identity")
}

func (x *bench) apply(identity string) {
	x.pool = poolOf("p", identity, x.spec)
	x.b.Update([]exchange.Pool{x.pool})
}

// poolOf compiles spec as edge/plan does.
func poolOf(name, identity string, spec *resealv1.BackendPool) exchange.Pool {
	spec = proto.CloneOf(spec).WithDefaults()
	config := &tls.Config{RootCAs: authority().pool, CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256}}
	switch spec.Protocol {
	case resealv1.BackendPool_PROTOCOL_AUTO:
		config.NextProtos = []string{"h2", "http/1.1"}
	case resealv1.BackendPool_PROTOCOL_HTTP2:
		config.NextProtos = []string{"h2"}
	case resealv1.BackendPool_PROTOCOL_HTTP1:
		config.NextProtos = []string{"http/1.1"}
	}
	return exchange.Pool{Name: name, UID: "uid", Spec: spec, TLS: config, Identity: identity}
}

func connections(f func(*resealv1.Connections)) option {
	return func(p *resealv1.BackendPool) {
		if p.Connections == nil {
			p.Connections = &resealv1.Connections{}
		}
		f(p.Connections)
	}
}

func timeouts(f func(*resealv1.BackendTimeouts)) option {
	return func(p *resealv1.BackendPool) {
		if p.Timeouts == nil {
			p.Timeouts = &resealv1.BackendTimeouts{}
		}
		f(p.Timeouts)
	}
}

func protocol(v resealv1.BackendPool_Protocol) option {
	return func(p *resealv1.BackendPool) { p.Protocol = v }
}

func retries(n uint32, on ...resealv1.Retries_Condition) option {
	return func(p *resealv1.BackendPool) { p.Retries = &resealv1.Retries{Attempts: &n, On: on} }
}

func dur(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

func newCall() *exchange.Exchange {
	return &exchange.Exchange{Pool: "p", Client: 1, Source: netip.MustParseAddrPort("192.0.2.1:1000")}
}

func newRequest(t testing.TB, method, path string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "https://"+testName+path, body)
	if err != nil {
		t.Fatal(err)
	}
	req.GetBody = nil // as a server's request
	return req
}

// do makes one request and reads the response.
func (x *bench) do(req *http.Request, call *exchange.Exchange) (*http.Response, []byte) {
	x.t.Helper()
	resp, body, err := x.try(req, call)
	if err != nil {
		x.t.Fatalf("%s %s: %v", req.Method, req.URL, err)
	}
	return resp, body
}

func (x *bench) try(req *http.Request, call *exchange.Exchange) (*http.Response, []byte, error) {
	if call == nil {
		call = newCall()
	}
	resp, err := x.RoundTrip(req, call)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

func (x *bench) get(path string) string {
	x.t.Helper()
	resp, body := x.do(newRequest(x.t, "GET", path, nil), nil)
	if resp.StatusCode != 200 {
		x.t.Fatalf("GET %s: %s", path, resp.Status)
	}
	return string(body)
}

// eventually waits for a condition that needs another goroutine.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// wantReason checks an error and its counting.
func wantReason(t testing.TB, err error, reason string, code int) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Reason != reason || e.Code != code {
		t.Fatalf("got error %v, want %s %d", err, reason, code)
	}
}

func (s *server) count(how string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ends[how]
}

func (s *server) describe() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprint(s.ends)
}
