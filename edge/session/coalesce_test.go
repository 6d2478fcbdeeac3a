package session

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const coalesceTimeout = resealv1.MissReason_MISS_REASON_COALESCE_TIMEOUT

// together makes n connections at the same time and counts how they went.
func (p *peer) together(n int, identity exchange.Identity) (full, resumed int, misses map[resealv1.MissReason]int) {
	p.t.Helper()
	misses = map[resealv1.MissReason]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			r := p.dial(identity)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case r.err != nil:
				p.t.Error(r.err)
			case r.mechanism != 0:
				resumed++
			default:
				full++
				misses[r.miss]++
			}
		})
	}
	wg.Wait()
	return full, resumed, misses
}

func TestColdStartCostsOneFullHandshake(t *testing.T) {
	for name, version := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, Config{})
			p.server.MaxVersion = version
			full, resumed, misses := p.together(64, "a")
			if full != 1 || resumed != 63 || misses[noSession] != 1 {
				t.Errorf("%d full, %d resumed, %v", full, resumed, misses)
			}
		})
	}
}

func TestColdStartWithSessionIDs(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	store := New(Config{})
	cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	var mu sync.Mutex
	seen := map[resealv1.Mechanism]int{}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			mechanism, _, err := visit(t, store, address, "a", cfg)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			seen[mechanism]++
			mu.Unlock()
		})
	}
	wg.Wait()
	if seen[0] != 1 || seen[sessionID] != 31 {
		t.Errorf("%v", seen)
	}
}

// A server that gives no session must not make handshakes wait for each other
// once that is known.
func TestNoWaitingForServersWithoutSessions(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.SessionTicketsDisabled = true
	p.want("a", 0, noSession)
	// That the server gives none is known once the first connection has been
	// read, which may be cut short by its end.
	for known := false; !known; p.dial("a") {
		p.store.mu.Lock()
		known = p.store.find("a").missing() == unsupported
		p.store.mu.Unlock()
	}
	started := time.Now()
	full, _, misses := p.together(32, "a")
	if full != 32 || misses[unsupported] != 32 {
		t.Errorf("%d full, %v", full, misses)
	}
	if took := time.Since(started); took >= patience {
		t.Errorf("they waited: %v", took)
	}
}

// A server's answer and its close_notify may come in one piece, after which
// nobody asks for more. That it gave no session is known all the same.
func TestAnswerAndEndAtOnce(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.SessionTicketsDisabled = true
	near, far := tcpPair(t)
	held := &corked{Conn: far}
	served := make(chan error, 1)
	go func() {
		server := tls.Server(held, p.server)
		err := server.Handshake()
		held.cork = true
		_, _ = server.Write([]byte("x"))
		_ = server.CloseWrite()
		held.release()
		served <- err
	}()
	tc, _, _, err := p.store.Handshake(t.Context(), near, "a", p.client)
	if err := errors.Join(err, <-served); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(tc); err != nil || string(answer) != "x" {
		t.Fatalf("%q, %v", answer, err)
	}
	p.store.mu.Lock()
	r := p.store.find("a")
	pending, missing := r.pending, r.missing()
	p.store.mu.Unlock()
	if pending != 0 || missing != unsupported {
		t.Errorf("%d connections may bring a session, the next handshake is %v", pending, missing)
	}
	near.Close()
}

// A server may send its ticket in one flight with the end of the handshake, and
// any part of it may come later. Until all of it is there, nobody knows that there
// is none.
func TestTicketThatComesInParts(t *testing.T) {
	for later := 1; later <= 250; later++ {
		p := newPeer(t, Config{})
		near, far := tcpPair(t)
		flight := make(chan int, 1)
		go func() {
			server := tls.Server(&measured{Conn: far, first: flight}, p.server)
			_, _ = server.Write([]byte("x"))
		}()
		parted := &parted{Conn: near, flight: flight, later: later, check: func() {
			if p.withheld("a") {
				t.Errorf("the last %d bytes of the flight are not there, and the server is said to give no session", later)
			}
		}}
		tc, _, _, err := p.store.Handshake(t.Context(), parted, "a", p.client)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tc.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if p.withheld("a") {
			t.Error("the ticket is not noticed")
		}
		near.Close()
	}
}

// measured tells how long the first write is.
type measured struct {
	net.Conn
	first chan<- int
}

func (m *measured) Write(p []byte) (int, error) {
	if m.first != nil {
		m.first <- len(p)
		m.first = nil
	}
	return m.Conn.Write(p)
}

// parted gives the server's first flight in two parts, the second of them later
// bytes long, and calls check whenever it is asked for bytes of that.
type parted struct {
	net.Conn
	flight <-chan int
	later  int
	check  func()
	length int
	had    int
}

func (c *parted) Read(p []byte) (int, error) {
	if c.length == 0 {
		c.length = <-c.flight
	}
	if first := c.length - c.later - c.had; first > 0 {
		p = p[:min(len(p), first)]
	} else if c.had < c.length {
		c.check()
	}
	n, err := c.Conn.Read(p)
	c.had += n
	return n, err
}

// corked holds back what is written until it is released.
type corked struct {
	net.Conn
	cork bool
	data []byte
}

func (c *corked) Write(p []byte) (int, error) {
	if !c.cork {
		return c.Conn.Write(p)
	}
	c.data = append(c.data, p...)
	return len(p), nil
}

func (c *corked) release() {
	_ = c.SetWriteDeadline(time.Time{}) // crypto/tls lets nothing follow its close_notify
	_, _ = c.Conn.Write(c.data)
}

// Servers that take each ticket once and give one per connection: as many
// handshakes are resumed as tickets come.
func TestSingleUseWaitsForTheNextTicket(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("a", 0, noSession)
	p.store.mu.Lock()
	p.store.find("a").learn(reuseOnce, time.Now())
	p.store.mu.Unlock()
	full, resumed, misses := p.together(32, "a")
	if full != 0 || resumed != 32 {
		t.Errorf("%d full, %d resumed, %v", full, resumed, misses)
	}
}

// When the server has lost its sessions, one handshake finds out.
func TestDoubtCostsOneDecline(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a", 0, noSession)
	p.want("a", ticket, 0)
	p.server = p.server.Clone()
	p.server.SetSessionTicketKeys([][32]byte{{1}})
	p.store.Doubt("a")
	full, resumed, misses := p.together(32, "a")
	if full != 1 || resumed != 31 || misses[declined] != 1 {
		t.Errorf("%d full, %d resumed, %v", full, resumed, misses)
	}
}

// The sessions that a server gave before it lost its keys go with the first one
// that is declined.
func TestDeclineDropsOlderSessions(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("a", 0, noSession)
	_, closeFirst := p.open("a", true)
	_, closeSecond := p.open("a", true)
	closeFirst()
	closeSecond()
	p.server = p.server.Clone()
	p.server.SetSessionTicketKeys([][32]byte{{1}})
	p.want("a", 0, declined)
	for range 3 {
		p.want("a", psk, 0)
	}
}

func TestLeaderFailsAndTheNextOneLeads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		leader := s.begin(t, "a")
		if leader.miss != noSession {
			t.Fatalf("leader: %+v", leader)
		}
		next := make(chan offer)
		for range 3 {
			go func() {
				o, err := s.acquire(t.Context(), "a", exchange.Terms{Wait: time.Hour})
				if err != nil {
					t.Error(err)
				}
				next <- o
			}()
		}
		synctest.Wait()
		for range 3 {
			leader.pending.settle()
			leader = <-next
			synctest.Wait()
			select {
			case <-next:
				t.Fatal("two handshakes lead")
			default:
			}
		}
		leader.pending.settle()
	})
}

// A leader that hangs delays the others by the time-out; then exactly one goes
// ahead.
func TestCoalesceTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		hanging := s.begin(t, "a")
		started := time.Now()
		ahead := make(chan offer, 8)
		gaveUp := make(chan error, 8)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		for range 8 {
			go func() {
				o, err := s.acquire(ctx, "a", exchange.Terms{Wait: 2 * time.Second})
				if err != nil {
					gaveUp <- err
					return
				}
				ahead <- o
			}()
		}
		second := <-ahead
		if second.miss != coalesceTimeout || time.Since(started) != 2*time.Second {
			t.Errorf("%v after %v", second.miss, time.Since(started))
		}
		for range 7 {
			if err := <-gaveUp; !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		}
		if len(ahead) != 0 {
			t.Errorf("%d more went ahead", len(ahead))
		}
		second.pending.settle()
		hanging.pending.settle()
	})
}

// A connection that dies before its ticket came must not hold up the others.
func TestDeadLeaderReleasesWaiters(t *testing.T) {
	p := newPeer(t, Config{})
	near, far, wait := p.serve()
	tc, _, _, err := p.store.Handshake(t.Context(), near, "a", p.client)
	if err != nil {
		t.Fatal(err)
	}
	wait()
	waiting := make(chan result, 1)
	go func() { waiting <- p.dial("a") }()
	time.Sleep(20 * time.Millisecond)
	far.(*net.TCPConn).SetLinger(0)
	far.Close()
	_, _ = io.Copy(io.Discard, tc)
	tc.Close()
	select {
	case r := <-waiting:
		if r.err != nil {
			t.Error(r.err)
		}
	case <-time.After(1500 * time.Millisecond):
		t.Error("the waiter was not released")
	}
}

// Whoever asks not to wait never does, even when another one has gone ahead.
func TestImpatientNeverWaits(t *testing.T) {
	s := New(Config{})
	for range 3 {
		attempt, err := s.Reserve(t.Context(), "a", exchange.Terms{})
		if err != nil {
			t.Fatal(err)
		}
		defer attempt.Release()
	}
}

// While a server restarts one dial after another is refused. Nobody is late
// then, however long it takes: two that offer the lost session would cost two
// full handshakes.
func TestNobodyIsLateWhileLeadersChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		leader := s.begin(t, "a")
		next := make(chan offer)
		for range 8 {
			go func() {
				o, err := s.acquire(t.Context(), "a", exchange.Terms{Wait: 2 * time.Second})
				if err != nil {
					t.Error(err)
				}
				next <- o
			}()
		}
		for range 8 {
			time.Sleep(1500 * time.Millisecond)
			synctest.Wait()
			select {
			case <-next:
				t.Fatal("two handshakes lead")
			default:
			}
			leader.pending.settle()
			leader = <-next
		}
		leader.pending.settle()
	})
}

// TestNobodyGoesBeforeTheSessionIsFiled: a handshake of TLS 1.2 has completed, but
// its session is not filed yet, or it is not yet known in which way it is to be
// offered. Whoever comes then must not take the server for one that gives none, and
// let all go that wait.
func TestNobodyGoesBeforeTheSessionIsFiled(t *testing.T) {
	s, terms := New(Config{}), exchange.Terms{Wait: time.Minute}
	first := <-s.join("a", terms).turn
	waiting := s.join("a", terms)
	spy := &helloSpy{supply: &supply{}}
	cache := &connCache{store: s, identity: "a", offer: first, spy: spy, supply: spy.supply}
	cache.complete(false)
	late := s.join("a", terms)
	if len(waiting.turn) != 0 || len(late.turn) != 0 {
		t.Fatalf("%d and %d went ahead", len(waiting.turn), len(late.turn))
	}
	spy.supply.read.Store(true) // no session came of it
	first.pending.settle()
	for _, w := range []*waiter{waiting, late} {
		select {
		case o := <-w.turn:
			if o.miss != resealv1.MissReason_MISS_REASON_UNSUPPORTED_BY_PEER {
				t.Errorf("went ahead because of %v", o.miss)
			}
		default:
			t.Error("waits for a server that gives none")
		}
	}
}

// nothingYet is a connection on an event loop, which has nothing to read for now.
type nothingYet struct{ net.Conn }

func (nothingYet) Read([]byte) (int, error) { return 0, os.ErrDeadlineExceeded }

// TestQuietConnectionIsAwaited: on an event loop crypto/tls reads though nothing has
// come. Others still wait for the session that the connection may bring.
func TestQuietConnectionIsAwaited(t *testing.T) {
	s := New(Config{})
	first := <-s.join("a", exchange.Terms{Wait: time.Minute}).turn
	spy := &helloSpy{Conn: nothingYet{}, supply: &supply{}, pending: first.pending}
	spy.done.Store(true)
	_, _ = spy.Read(make([]byte, 100))
	if n := first.pending.record.pending; n != 1 {
		t.Errorf("%d connections are waited for, want 1", n)
	}
	first.pending.settle()
	if n := first.pending.record.pending; n != 0 {
		t.Errorf("%d connections are waited for at the end", n)
	}
}
