package loop

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits for what must happen.
const patience = time.Minute

// pollers runs a test with each way to wait.
func pollers(t *testing.T, test func(t *testing.T, cfg Config)) {
	t.Run("goroutines", func(t *testing.T) { test(t, Config{Goroutines: true}) })
	if runtime.GOOS == "linux" {
		t.Run("epoll", func(t *testing.T) { test(t, Config{}) })
	}
}

// versions runs a test with each version of TLS.
func versions(t *testing.T, test func(t *testing.T, version uint16)) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) { test(t, version) })
	}
}

// start runs a group until the test ends.
func start(t testing.TB, cfg Config) *Group {
	t.Helper()
	if cfg.Panicked == nil {
		cfg.Panicked = func(bug any, stack []byte) { t.Errorf("panic: %v\n%s", bug, stack) }
	}
	g := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := g.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return g
}

// on runs f on a loop and waits for it.
func on(t testing.TB, l *Loop, f func()) {
	t.Helper()
	done := make(chan struct{})
	if !l.Post(func() { defer close(done); f() }) {
		t.Fatal("the loop has ended")
	}
	receive(t, done, "a posted function to run")
}

// receive waits for a value.
func receive[T any](t testing.TB, from <-chan T, what string) T {
	t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case v := <-from:
		return v
	case <-timer.C:
		buffer := make([]byte, 1<<20)
		t.Fatalf("waited %s for %s\n%s", patience, what, buffer[:runtime.Stack(buffer, true)])
		panic("unreachable")
	}
}

// eventually waits until a condition that is looked at on the loop holds.
func eventually(t testing.TB, l *Loop, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		var ok bool
		on(t, l, func() { ok = condition() })
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", patience, what)
		}
	}
}

// funcs is a Handler of functions, all of which may be nil.
type funcs struct {
	open      func(c *Conn)
	data      func(c *Conn, p []byte)
	peerEnded func(c *Conn, notified bool)
	writable  func(c *Conn)
	closed    func(c *Conn, end Ending)
}

func (f *funcs) Open(c *Conn) {
	if f.open != nil {
		f.open(c)
	}
}

func (f *funcs) Data(c *Conn, p []byte) {
	if f.data != nil {
		f.data(c, p)
	}
}

func (f *funcs) PeerEnded(c *Conn, notified bool) {
	if f.peerEnded != nil {
		f.peerEnded(c, notified)
	}
}

func (f *funcs) Writable(c *Conn) {
	if f.writable != nil {
		f.writable(c)
	}
}

func (f *funcs) Closed(c *Conn, end Ending) {
	if f.closed != nil {
		f.closed(c, end)
	}
}

// echo answers with what comes, minding backpressure, and ends when the peer does.
func echo(ended chan<- Ending) *funcs {
	return &funcs{
		data: func(c *Conn, p []byte) {
			if !c.Write(p) {
				c.Pause()
			}
		},
		writable:  func(c *Conn) { c.Resume() },
		peerEnded: func(c *Conn, _ bool) { c.Close(Farewell{Within: patience, FIN: true}) },
		closed: func(_ *Conn, end Ending) {
			if ended != nil {
				ended <- end
			}
		},
	}
}

// tcpPair is a TCP connection.
func tcpPair(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dialled, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close() })
	// So that a test need not send much until the peer takes no more.
	_ = dialled.(*net.TCPConn).SetReadBuffer(64 << 10)
	_ = accepted.(*net.TCPConn).SetWriteBuffer(64 << 10)
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

// certificate is the servers' certificate.
var certificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"loop.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func serverConfig(version uint16) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{certificate()}, MinVersion: version, MaxVersion: version,
		DynamicRecordSizingDisabled: true,
	}
}

func clientConfig(version uint16) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true, ServerName: "loop.test", MinVersion: version, MaxVersion: version,
		DynamicRecordSizingDisabled: true,
	}
}

// handshake makes the handshake of both ends, each of which may be over a Wire.
func handshake(t testing.TB, client, server net.Conn, version uint16) (*tls.Conn, *tls.Conn) {
	t.Helper()
	s, c := tls.Server(server, serverConfig(version)), tls.Client(client, clientConfig(version))
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return c, s
}

// serve makes a TLS connection whose server is on a loop.
func serve(t testing.TB, l *Loop, version uint16, h Handler) (*tls.Conn, *net.TCPConn) {
	t.Helper()
	client, server := tcpPair(t)
	wire := NewWire(server)
	tc, ts := handshake(t, client, wire, version)
	if err := l.Join(wire, ts, h); err != nil {
		t.Fatal(err)
	}
	return tc, client
}

// servePlain is serve without TLS.
func servePlain(t testing.TB, l *Loop, h Handler) *net.TCPConn {
	t.Helper()
	client, server := tcpPair(t)
	if err := l.Join(NewWire(server), nil, h); err != nil {
		t.Fatal(err)
	}
	return client
}
