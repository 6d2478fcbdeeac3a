package frontend

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/legtest"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits for what must happen. Tests assert no times.
const patience = 10 * time.Second

func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	within(t, patience, what, condition)
}

func within(t testing.TB, bound time.Duration, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(bound); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, bound)
		}
	}
}

// counts implements Counters.
type counts struct {
	mu           sync.Mutex
	resumed      map[resealv1.Mechanism]int
	misses       map[resealv1.MissReason]int
	tickets      map[string]int // "keyring/epoch reason"
	failed       int
	opened, gone int
	active, idle int
	codes        map[int]int
	reused       int
	errors       map[string]int
	cells        map[*exchange.Counter]int64 // of the others
}

func newCounts() *counts {
	return &counts{
		resumed: map[resealv1.Mechanism]int{}, misses: map[resealv1.MissReason]int{}, tickets: map[string]int{},
		codes: map[int]int{}, errors: map[string]int{}, cells: map[*exchange.Counter]int64{},
	}
}

func (c *counts) do(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *counts) Handshake(m resealv1.Mechanism, miss resealv1.MissReason, _ uint16, _ time.Duration) {
	c.do(func() {
		if m == 0 {
			c.misses[miss]++
		} else {
			c.resumed[m]++
		}
	})
}
func (c *counts) Ticket(keyring string, epoch uint64, miss resealv1.MissReason) {
	c.do(func() { c.tickets[fmt.Sprintf("%s/%d %s", keyring, epoch, resealv1.Label(miss))]++ })
}
func (c *counts) HandshakeFailed(time.Duration) { c.do(func() { c.failed++ }) }
func (c *counts) Add(cell exchange.Cell, delta int64) {
	at, d := cell.Places(), int(delta)
	c.do(func() {
		switch cell.Counter {
		case exchange.Opened:
			c.opened += d
		case exchange.Closed:
			c.gone += d
		case exchange.Connections:
			if at[0] == exchange.Active {
				c.active += d
			} else {
				c.idle += d
			}
		case exchange.Answers:
			c.codes[at[0]] += d
		default:
			c.cells[cell.Counter] += delta
		}
	})
}
func (c *counts) Request(reused bool, _ time.Duration) {
	c.do(func() {
		if reused {
			c.reused++
		}
	})
}
func (c *counts) Error(reason string) { c.do(func() { c.errors[reason]++ }) }

// read runs f with the counters at rest.
func read[T any](c *counts, f func(c *counts) T) T {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f(c)
}

// upstreamFuncs is an upstream that blocks.
type upstreamFuncs struct {
	roundTrip func(*http.Request, *exchange.Exchange) (*http.Response, error)
	tunnel    func(context.Context, *exchange.Exchange) (exchange.Tunnel, error)
}

func (u upstreamFuncs) RoundTrip(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
	return u.roundTrip(r, x)
}

func (u upstreamFuncs) Tunnel(ctx context.Context, x *exchange.Exchange) (exchange.Tunnel, error) {
	return u.tunnel(ctx, x)
}

func (u upstreamFuncs) onLoops() Upstream { return legtest.Upstream{Leg: u} }

// answering is an upstream that answers with a text.
func answering(text string) upstreamFuncs {
	return upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		if r.Body != nil {
			_, _ = io.Copy(io.Discard, r.Body)
		}
		return textResponse(200, text), nil
	}}
}

func textResponse(code int, text string) *http.Response {
	return &http.Response{
		StatusCode: code, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(text)), ContentLength: int64(len(text)),
	}
}

// statusError is an upstream's error that knows its answer.
type statusError struct {
	code   int
	reason string
}

func (e statusError) Error() string             { return "upstream: " + e.reason }
func (e statusError) HTTPStatus() (int, string) { return e.code, e.reason }

// edge is a running Frontend.
type edge struct {
	t        testing.TB
	frontend *Frontend
	roots    *x509.CertPool
	cert     tls.Certificate
	stop     func() // ends Run and waits for it

	mu       sync.Mutex
	counters map[string]*counts
	records  []map[string]any
}

// loops run until the test's end.
func loops(t testing.TB) *loop.Group {
	t.Helper()
	group := loop.New(loop.Config{Loops: 2, Panicked: func(bug any, stack []byte) { t.Errorf("panic: %v\n%s", bug, stack) }})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- group.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return group
}

// newEdge runs a Frontend with the listener "main", changed by change. At the
// test's end it stops it and checks that all that was opened was closed.
func newEdge(t *testing.T, upstream upstreamFuncs, change ...func(*exchange.Listener)) *edge {
	t.Helper()
	return newEdgeOf(t, Config{Upstream: upstream.onLoops()}, change...)
}

// newEdgeOf is newEdge with more of a Config.
func newEdgeOf(t *testing.T, cfg Config, change ...func(*exchange.Listener)) *edge {
	t.Helper()
	e := &edge{t: t, counters: map[string]*counts{}}
	e.cert, e.roots = selfSigned(t, "app.test", "*.wild.test")
	cfg.Counters = func(name string) Counters { return e.count(name) }
	cfg.Logger = slog.New(slog.DiscardHandler)
	cfg.AccessLog = logWriter{e}
	cfg.Loops = loops(t)
	e.frontend = New(cfg)
	e.apply(e.listener("main", change...))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := e.frontend.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	e.stop = func() {
		cancel()
		select {
		case <-done:
		case <-time.After(patience):
			t.Error("Run does not end")
		}
	}
	t.Cleanup(func() {
		e.stop()
		for name, c := range e.counters {
			if c.opened != c.gone || c.active != 0 || c.idle != 0 {
				t.Errorf("%s: opened %d, closed %d, active %d, idle %d", name, c.opened, c.gone, c.active, c.idle)
			}
		}
		// Handlers end soon after their connections.
		eventually(t, "all memory that was reckoned is given back", func() bool { return e.frontend.memory.held.Load() == 0 })
	})
	return e
}

func (e *edge) count(name string) *counts {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.counters[name] == nil {
		e.counters[name] = newCounts()
	}
	return e.counters[name]
}

// listener is a listener that allows app.test and sends all to the pool "web".
func (e *edge) listener(name string, change ...func(*exchange.Listener)) exchange.Listener {
	l := exchange.Listener{
		Name: name, UID: "uid", PolicyKey: "policy",
		Spec: &resealv1.Listener{Address: "127.0.0.1:0", Timeouts: &resealv1.ListenerTimeouts{Drain: durationpb.New(2 * time.Second)}},
		TLS:  &tls.Config{Certificates: []tls.Certificate{e.cert}, NextProtos: []string{"h2", "http/1.1"}},
		Route: func(host, path string) (exchange.Match, bool) {
			return exchange.Match{Route: "r", Pool: "web"}, true
		},
		AllowsHost: func(host string) bool { return host == "app.test" || strings.HasSuffix(host, ".wild.test") },
	}
	for _, f := range change {
		f(&l)
	}
	l.Spec = l.Spec.WithDefaults()
	return l
}

// apply makes listeners the configuration.
func (e *edge) apply(listeners ...exchange.Listener) {
	e.t.Helper()
	change, violations := e.frontend.Prepare(listeners)
	for _, v := range violations {
		e.t.Fatal(v.Text())
	}
	change.Commit()
}

func (e *edge) address(listener string) string {
	e.t.Helper()
	address := e.frontend.Addr(listener)
	if address == nil {
		e.t.Fatalf("no listener %q", listener)
	}
	return address.String()
}

// client is an HTTP client that takes every name for the listener "main".
func (e *edge) client(http2 bool, change ...func(*http.Transport)) *http.Client {
	address := e.address("main")
	transport := &http.Transport{
		TLSClientConfig:    &tls.Config{RootCAs: e.roots},
		ForceAttemptHTTP2:  http2,
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		},
	}
	if !http2 {
		transport.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	for _, f := range change {
		f(transport)
	}
	e.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// dial is a TLS connection to the listener "main".
func (e *edge) dial(change ...func(*tls.Config)) *tls.Conn {
	e.t.Helper()
	cfg := &tls.Config{RootCAs: e.roots, ServerName: "app.test", NextProtos: []string{"http/1.1"}}
	for _, f := range change {
		f(cfg)
	}
	conn, err := tls.Dial("tcp", e.address("main"), cfg)
	if err != nil {
		e.t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	e.t.Cleanup(func() { conn.Close() })
	return conn
}

type logWriter struct{ e *edge }

func (w logWriter) Write(line []byte) (int, error) {
	var record map[string]any
	if err := json.Unmarshal(line, &record); err != nil {
		w.e.t.Error(err)
	}
	w.e.mu.Lock()
	defer w.e.mu.Unlock()
	w.e.records = append(w.e.records, record)
	return len(line), nil
}

// logged waits for the n-th record, from 1.
func (e *edge) logged(n int) map[string]any {
	e.t.Helper()
	var record map[string]any
	eventually(e.t, "a log record", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		if len(e.records) < n {
			return false
		}
		record = maps.Clone(e.records[n-1])
		return true
	})
	return record
}

func selfSigned(t testing.TB, names ...string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, roots
}

func bodyOf(t testing.TB, response *http.Response) string {
	t.Helper()
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
