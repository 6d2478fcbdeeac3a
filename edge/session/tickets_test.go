package session

import (
	"crypto/tls"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// takeOnce makes the server take each ticket once. Each handshake brings one.
func (p *peer) takeOnce() {
	var mu sync.Mutex
	seen := map[string]bool{}
	base := p.server.Clone()
	p.server = base.Clone()
	p.server.UnwrapSession = func(identity []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		mu.Lock()
		defer mu.Unlock()
		if seen[string(identity)] {
			return nil, nil
		}
		seen[string(identity)] = true
		return base.DecryptTicket(identity, cs)
	}
	p.server.WrapSession = func(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
		return base.EncryptTicket(cs, ss)
	}
}

// A cold start with a server that takes each ticket once costs what it takes to
// find out its nature, whatever the concurrency.
func TestColdStartWithSingleUseTickets(t *testing.T) {
	p := newPeer(t, Config{})
	p.takeOnce()
	full, resumed, misses := p.together(128, "a")
	if full != 2 || resumed != 126 || misses[noSession] != 1 || misses[declined] != 1 {
		t.Errorf("%d full, %d resumed, %v", full, resumed, misses)
	}
	// It is not learned anew.
	for range 3 {
		if full, resumed, misses := p.together(32, "a"); full != 0 {
			t.Errorf("%d full, %d resumed, %v", full, resumed, misses)
		}
	}
}

// The stock goes from edge to edge with the load, and each ticket to one.
func TestStockFollowsTheLoad(t *testing.T) {
	p := newPeer(t, Config{})
	p.takeOnce()
	edges := []*peer{p}
	p.want("a", 0, noSession)
	total := map[resealv1.MissReason]int{noSession: 1}
	visit := func(e *peer) {
		full, _, misses := e.together(32, "a")
		for why, n := range misses {
			total[why] += n
		}
		t.Logf("%d full %v, stock %d", full, misses, len(e.store.find("a").sessions))
	}
	rest := func() {
		for _, e := range edges {
			e.store.mu.Lock()
			if r := e.store.find("a"); r != nil {
				for _, h := range r.sessions {
					h.filed = h.filed.Add(-time.Minute)
				}
			}
			e.store.mu.Unlock()
		}
	}
	seed := func(to *peer) {
		rest()
		for _, e := range edges {
			if e == to {
				continue
			}
			for identity, containers := range e.store.Deal("a", 1, maxOfferItems) {
				if err := to.store.Adopt(identity, "e1", containers[0], p.client); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for range 7 {
		e := p.at(New(Config{}))
		seed(e)
		visit(e)
		edges = append(edges, e)
	}
	for _, e := range edges {
		e.store = restart(t, e.store, true)
		seed(e)
		visit(e)
	}
	if n := total[noSession] + total[declined]; n != 2 || len(total) != 2 {
		t.Errorf("full handshakes: %v", fmt.Sprint(total, slices.Collect(maps.Keys(total))))
	}
}

// A ticket that no ClientHello can hold is as good as none. One that is large is
// offered.
func TestLargeTickets(t *testing.T) {
	for version, mechanism := range map[uint16]resealv1.Mechanism{tls.VersionTLS12: ticket, tls.VersionTLS13: psk} {
		for size, resumes := range map[int]bool{20_000: true, maxOffered: true, maxOffered + 1: false, 65_000: false} {
			p := newPeer(t, Config{})
			base := p.server.Clone()
			p.server = base.Clone()
			p.server.MaxVersion = version
			p.server.WrapSession = func(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
				sealed, err := base.EncryptTicket(cs, ss)
				padded := make([]byte, size)
				copy(padded[size-len(sealed):], sealed)
				padded[0], padded[1] = byte(len(sealed)>>8), byte(len(sealed))
				return padded, err
			}
			p.server.UnwrapSession = func(identity []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
				if len(identity) < 2 {
					return nil, nil
				}
				return base.DecryptTicket(identity[len(identity)-(int(identity[0])<<8|int(identity[1])):], cs)
			}
			p.want("a", 0, noSession)
			for range 2 {
				if resumes {
					p.want("a", mechanism, 0)
				} else {
					p.want("a", 0, unsupported)
				}
			}
		}
	}
}

// An edge that has measured nothing goes by what another one, or its earlier
// life, has measured: otherwise a server, or a machine, that is busy from the
// start looks like one that is far away.
func TestTurnsOfEarlier(t *testing.T) {
	now := time.Now()
	terms := exchange.Terms{Wait: 2 * time.Second, TicketWait: 50 * time.Millisecond}
	for hint, grows := range map[time.Duration]bool{0: true, 10 * time.Millisecond: false} {
		r := &record{knowledge: knowledge{reuse: reuseOnce}, pending: 4, queue: make([]*waiter, 28)}
		r.merge(knowledge{turn: hint}, now)
		for range 16 {
			r.turns.add(100*time.Millisecond, r.turn, now)
		}
		if r.grows(terms, now) != grows {
			t.Errorf("hint %v: %t", hint, !grows)
		}
		if hint > 0 && r.turns.shortest() != hint {
			t.Errorf("shortest %v", r.turns.shortest())
		}
		// It counts until there are ones of its own.
		for i := range 3 {
			r.turns.add(100*time.Millisecond, r.turn, now.Add(time.Duration(i+1)*(leastPeriod+1)))
		}
		if r.turns.shortest() != 100*time.Millisecond {
			t.Errorf("shortest %v after a while", r.turns.shortest())
		}
	}
}
