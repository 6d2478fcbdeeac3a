package loop

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// address is one that ends in a number.
func address(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, n}) }

func newTurn(from byte, likely bool) *turn {
	return &turn{source: address(from), likely: likely, goes: make(chan struct{}, 1)}
}

// order runs those that wait, one after the other, and returns their sources,
// likely ones in upper case.
func order(t *turns) string {
	var order strings.Builder
	for next := t.next(); next != nil; next = t.next() {
		letter := next.source.As4()[3]
		if next.likely {
			letter -= 'a' - 'A'
		}
		order.WriteByte(letter)
		t.done()
	}
	return order.String()
}

// TestTurnsOrder: sources take turns, likely resumptions go first, and full
// handshakes do not starve.
func TestTurnsOrder(t *testing.T) {
	tests := []struct{ enter, want string }{
		{"aaab", "abaa"},
		{"aabbcc", "abcabc"},
		{"abA", "Aab"},
		{"aaaAAAAAAAAAA", "AAAAaAAAAaAAa"},
		{"aBaBaB", "BBBaaa"},
	}
	for _, test := range tests {
		all := &turns{maxComputing: 1, maxBegun: 1, maxWaiting: 100}
		for _, letter := range []byte(test.enter) {
			likely := letter < 'a'
			if likely {
				letter += 'a' - 'A'
			}
			if all.enter(newTurn(letter, likely)) != nil {
				t.Errorf("%s: one was refused", test.enter)
			}
		}
		if got := order(all); got != test.want {
			t.Errorf("%s: the order is %s, want %s", test.enter, got, test.want)
		}
		if len(all.full.bySource)+len(all.likely.bySource)+all.waiting+all.begun+all.computing != 0 {
			t.Errorf("%s: something is left: %+v", test.enter, all)
		}
	}
}

// TestTurnsRefuse: at the bound the newest of the source with the most is refused,
// so a flood from one source costs others nothing.
func TestTurnsRefuse(t *testing.T) {
	all := &turns{maxComputing: 1, maxBegun: 1, maxWaiting: 4}
	for _, letter := range []byte("aaab") {
		all.enter(newTurn(letter, false))
	}
	last := newTurn('a', false)
	if all.enter(last) != last {
		t.Error("one of the flood was let in, at the bound")
	}
	if refused := all.enter(newTurn('c', true)); refused == nil || refused.source != address('a') {
		t.Errorf("for another source was refused: %+v", refused)
	}
	if got := order(all); got != "Caba" {
		t.Errorf("the order is %s", got)
	}
}

// TestTurnsBounds: one that rests leaves its right to compute to others, and goes on
// before others begin; no more are under way than may be.
func TestTurnsBounds(t *testing.T) {
	all := &turns{maxComputing: 1, maxBegun: 2, maxWaiting: 100}
	for _, letter := range []byte("abc") {
		all.enter(newTurn(letter, false))
	}
	a := all.next()
	if all.next() != nil {
		t.Fatal("two compute")
	}
	all.rest()
	b := all.next()
	if b == nil || b.source != address('b') {
		t.Fatal("the second did not begin while the first rests")
	}
	all.resume(a)
	if all.next() != nil {
		t.Fatal("two compute")
	}
	all.rest()
	if next := all.next(); next != a {
		t.Fatalf("%+v goes before one that was begun", next)
	}
	all.done()
	if c := all.next(); c == nil || c.source != address('c') {
		t.Fatal("the third did not begin once the first was done")
	}
}

// clientHello is what a client of crypto/tls says first.
func clientHello(t *testing.T, cfg *tls.Config) []byte {
	t.Helper()
	m := &memory{joined: true}
	_ = tls.Client(m, cfg).Handshake()
	return m.take()
}

// TestOffered: tickets are found in hellos as crypto/tls makes them, at the moment
// at which they are complete, and in whatever records they come.
func TestOffered(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		if hello := clientHello(t, clientConfig(version)); len(hello) == 0 {
			t.Fatal("there is no hello")
		} else if tickets, complete := offered(hello); !complete || len(tickets) != 0 {
			t.Errorf("a hello without tickets: %d, complete %t", len(tickets), complete)
		}
		cache := tls.NewLRUClientSessionCache(1)
		e := memoryEnds(t, version, func(client, _ *tls.Config) { client.ClientSessionCache = cache })
		_, _ = e.client.Read(make([]byte, 1))
		session, ok := cache.Get("loop.test")
		if !ok {
			t.Fatal("there is no session")
		}
		want, _, _ := session.ResumptionState()
		cfg := clientConfig(version)
		cfg.ClientSessionCache = cache
		hello := clientHello(t, cfg)
		for n := range len(hello) + 1 {
			tickets, complete := offered(hello[:n])
			if complete != (n == len(hello)) {
				t.Fatalf("of %d bytes %d are complete: %t", len(hello), n, complete)
			}
			if complete && (len(tickets) != 1 || !bytes.Equal(tickets[0], want)) {
				t.Errorf("the tickets are %x, want %x", tickets, want)
			}
		}
		var parts []byte
		for part := range slices.Chunk(hello[recordHeader:], 50) {
			parts = append(append(parts, recordHandshake, 3, 1, 0, byte(len(part))), part...)
		}
		if tickets, complete := offered(parts); !complete || len(tickets) != 1 || !bytes.Equal(tickets[0], want) {
			t.Errorf("in pieces the tickets are %x, complete %t", tickets, complete)
		}
	})
	for _, other := range []string{"GET / HTTP/1.1\r\n", "\x16\x03\x01\x00\x00", "\x16\x03\x01\x00\x04\x02\x00\x00\x00"} {
		if tickets, complete := offered([]byte(other)); !complete || tickets != nil {
			t.Errorf("%q is a hello that is not complete", other)
		}
	}
}

func FuzzOffered(f *testing.F) {
	f.Add([]byte("\x16\x03\x01\x00\x04\x01\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		whole, complete := offered(p)
		for n := range p {
			if _, before := offered(p[:n]); before && !complete {
				t.Fatalf("%d bytes are complete, and %d are not", n, len(p))
			}
		}
		_ = whole
	})
}

// pooled is a server behind Handshakes, over net.Pipe.
type pooled struct {
	client *tls.Conn
	err    chan error
}

func connect(t *testing.T, h *Handshakes, from byte, cfg *tls.Config, work func()) *pooled {
	t.Helper()
	a, b := net.Pipe()
	p := &pooled{client: tls.Client(a, cfg), err: make(chan error, 1)}
	go func() {
		wire := NewWire(b)
		server := tls.Server(wire, serverConfig(cfg.MaxVersion))
		err := h.Do(wire, address(from), func() error {
			work()
			return server.Handshake()
		})
		if err != nil {
			b.Close()
		}
		p.err <- err
	}()
	go func() { _ = p.client.Handshake() }()
	return p
}

// TestHandshakes: computing and waiting are bounded and told, a slow client holds
// nobody up, and one that says nothing is given up.
func TestHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var computing, most, waits, mostWaits, refused, waited atomic.Int32
		var crowded []bool
		h := NewHandshakes(HandshakesConfig{
			Computing: 2, Waiting: 10, HelloTime: time.Second,
			Wait: func(d int) {
				mostWaits.Store(max(mostWaits.Load(), waits.Add(int32(d))))
			},
			Waited:  func(time.Duration) { waited.Add(1) },
			Refused: func() { refused.Add(1) },
			Crowded: func(yes bool) { crowded = append(crowded, yes) },
		})
		work := func() {
			most.Store(max(most.Load(), computing.Add(1)))
			time.Sleep(10 * time.Millisecond)
			computing.Add(-1)
		}
		mute, silent := net.Pipe()
		began := time.Now()
		err := h.Do(NewWire(silent), address(1), func() error { t.Error("a handshake without hello"); return nil })
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() || time.Since(began) != time.Second {
			t.Errorf("a client without hello: %v after %s", err, time.Since(began))
		}
		mute.Close()
		silent.Close()

		var all []*pooled
		for i := range 12 {
			all = append(all, connect(t, h, byte(i), clientConfig(tls.VersionTLS13), work))
		}
		synctest.Wait()
		began = time.Now()
		more := connect(t, h, 0, clientConfig(tls.VersionTLS13), work)
		if err := <-more.err; err != ErrRefused {
			t.Errorf("the one too many: %v", err)
		}
		for _, p := range all {
			if err := <-p.err; err != nil {
				t.Error(err)
			}
		}
		if most.Load() != 2 || mostWaits.Load() != 10 || waits.Load() != 0 || refused.Load() != 1 || waited.Load() != 10 {
			t.Errorf("%d computed at once, %d waited at once, %d still wait, %d were refused, %d had waited",
				most.Load(), mostWaits.Load(), waits.Load(), refused.Load(), waited.Load())
		}
		if took := time.Since(began); took != 60*time.Millisecond {
			t.Errorf("12 handshakes of 10 ms, two at once, took %s", took)
		}
		if !slices.Equal(crowded, []bool{true, false}) {
			t.Errorf("Crowded was told %v", crowded)
		}
		for _, p := range append(all, more) {
			p.client.NetConn().Close()
		}
	})
}

// TestHandshakesSlowClient: handshakes that wait for their clients leave the right
// to compute to others.
func TestHandshakesSlowClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHandshakes(HandshakesConfig{Computing: 1})
		var slow []net.Conn
		ended := make(chan error, 5)
		for range 5 {
			a, b := net.Pipe()
			slow = append(slow, a)
			go func() {
				wire := NewWire(b)
				ended <- h.Do(wire, address(1), tls.Server(wire, serverConfig(tls.VersionTLS13)).Handshake)
			}()
			go func() { _, _ = a.Write(clientHello(t, clientConfig(tls.VersionTLS13))) }() // and no more
		}
		synctest.Wait()
		quick := connect(t, h, 1, clientConfig(tls.VersionTLS13), func() {})
		if err := <-quick.err; err != nil {
			t.Error(err)
		}
		quick.client.NetConn().Close()
		for _, a := range slow {
			a.Close()
			if err := <-ended; err == nil {
				t.Error("a handshake without its client is complete")
			}
		}
	})
}

// TestHandshakesLeft: a client that has left costs no handshake.
func TestHandshakesLeft(t *testing.T) {
	h := NewHandshakes(HandshakesConfig{Computing: 1})
	var hold, begun sync.WaitGroup
	hold.Add(1)
	begun.Add(1)
	client, server := tcpPair(t)
	var running sync.WaitGroup
	running.Go(func() {
		_ = h.Do(NewWire(server), address(1), func() error { begun.Done(); hold.Wait(); return nil })
		server.Close()
	})
	if _, err := client.Write(clientHello(t, clientConfig(tls.VersionTLS13))); err != nil {
		t.Fatal(err)
	}
	begun.Wait()
	for _, reset := range []bool{false, true} {
		client, server := tcpPair(t)
		if _, err := client.Write(clientHello(t, clientConfig(tls.VersionTLS13))); err != nil {
			t.Fatal(err)
		}
		if reset {
			_ = client.SetLinger(0)
		}
		wire := NewWire(server)
		running.Go(func() {
			if err := h.Do(wire, address(2), func() error { t.Error("a handshake without a client"); return nil }); err != ErrLeft {
				t.Errorf("a client that left: %v", err)
			}
			server.Close()
		})
		for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			h.mu.Lock()
			waits := h.turns.waiting
			h.mu.Unlock()
			if waits > 0 && !reset || waits > 1 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("it does not wait")
			}
		}
		client.Close()
		for deadline := time.Now().Add(patience); !wire.left(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the kernel does not know that the client left")
			}
		}
	}
	hold.Done()
	running.Wait()
}

// TestListener: while it is paused connections stay in the accept queue.
func TestListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 10)
	l := NewListener(inner, func(c net.Conn) { accepted <- c }, func(err error, _ time.Duration) { t.Error(err) })
	ctx := t.Context()
	var running sync.WaitGroup
	running.Go(func() {
		if err := l.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(running.Wait)
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	receive(t, accepted, "a connection").Close()
	l.Pause()
	l.Pause()
	dial() // may be the one that was being accepted
	waiting := dial()
	l.Resume()
	if _, err := io.WriteString(waiting, "x"); err != nil {
		t.Fatal(err)
	}
	timer := time.NewTimer(50 * time.Millisecond)
	for count := 0; ; {
		select {
		case c := <-accepted:
			c.Close()
			if count++; count == 1 {
				continue
			}
			t.Fatal("connections were accepted while paused")
		case <-timer.C:
		}
		break
	}
	l.Resume()
	for c := receive(t, accepted, "a connection"); ; c = receive(t, accepted, "a connection") {
		same := c.RemoteAddr().String() == waiting.LocalAddr().String()
		c.Close()
		if same {
			return
		}
	}
}
