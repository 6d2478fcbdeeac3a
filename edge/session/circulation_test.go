package session

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// onceServer takes each ticket once and gives one per handshake. Its clock is the
// bubble's; how many cores it has and how far away it is are fields.
type onceServer struct {
	store         *Store
	cores         chan struct{}
	full, resumed time.Duration // of a core
	distance      time.Duration // of a handshake, there and back
	many          bool          // it takes tickets again after all

	mu     sync.Mutex
	spent  map[*held]bool
	fulls  map[resealv1.MissReason]int
	waited time.Duration // the longest
}

func newOnceServer(cores int, full, resumed, distance time.Duration) *onceServer {
	return &onceServer{
		store: New(Config{}), cores: make(chan struct{}, cores), full: full, resumed: resumed, distance: distance,
		spent: map[*held]bool{}, fulls: map[resealv1.MissReason]int{},
	}
}

// visit is one connection: what Attempt.Handshake does, without TLS.
func (s *onceServer) visit(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	asked := time.Now()
	o, err := s.store.acquire(ctx, "a", exchange.Terms{Wait: 2 * time.Second, TicketWait: 50 * time.Millisecond})
	if err != nil {
		t.Error(err)
		return
	}
	waited := time.Since(asked)
	s.cores <- struct{}{}
	s.mu.Lock()
	s.waited = max(s.waited, waited)
	resumed := o.session != nil && (s.many || !s.spent[o.session])
	if o.session != nil {
		s.spent[o.session] = true
	}
	cost := s.full
	if resumed {
		cost = s.resumed
	}
	s.mu.Unlock()
	time.Sleep(cost/2 + rand.N(cost))
	<-s.cores
	time.Sleep(s.distance)

	cache := &connCache{store: s.store, identity: "a", offer: o, spy: &helloSpy{offered: o.session != nil}, supply: &supply{}}
	_, miss := s.store.outcome(cache, tls.ConnectionState{Version: tls.VersionTLS13, DidResume: resumed})
	if miss != 0 {
		s.mu.Lock()
		s.fulls[miss]++
		s.mu.Unlock()
	}
	s.store.connected(cache, resumed)
	s.store.keep(cache, &held{version: tls.VersionTLS13, useBy: time.Now().Add(time.Hour), size: 1})
	o.pending.settle()
}

// load makes a number of visits, a number of them at a time, and returns how many
// were full and how long all of it took.
func (s *onceServer) load(t *testing.T, clients, visits int) (full int, took time.Duration) {
	begin := time.Now()
	next := make(chan struct{}, visits)
	for range visits {
		next <- struct{}{}
	}
	close(next)
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range next {
				s.visit(t)
			}
		})
	}
	wg.Wait()
	for _, n := range s.fulls {
		full += n
	}
	return full, time.Since(begin)
}

const millisecond = time.Millisecond

// Full handshakes follow the demand: a server, or a machine, that has no time
// does not get more of them because everything takes longer.
func TestFullHandshakesFollowDemand(t *testing.T) {
	for name, test := range map[string]struct {
		server          func() *onceServer
		clients, visits int
		full            int           // at most
		took            time.Duration // at most, of which the server's own time is a part
	}{
		"quick server":      {func() *onceServer { return newOnceServer(2, 2*millisecond, millisecond, 0) }, 32, 5_000, 5, 3 * time.Second},
		"busy server":       {func() *onceServer { return newOnceServer(2, 40*millisecond, 20*millisecond, 0) }, 32, 1_500, 8, 18 * time.Second},
		"busiest server":    {func() *onceServer { return newOnceServer(1, 90*millisecond, 60*millisecond, 0) }, 32, 800, 16, 60 * time.Second},
		"all at once":       {func() *onceServer { return newOnceServer(2, 4*millisecond, 2*millisecond, 0) }, 256, 256, 8, 600 * millisecond},
		"all at once, busy": {func() *onceServer { return newOnceServer(2, 40*millisecond, 20*millisecond, 0) }, 256, 256, 12, 6 * time.Second},
		// Here handshakes take long without anybody being busy. As many tickets
		// as connections that are opened at a time are right.
		"far away": {func() *onceServer { return newOnceServer(32, 2*millisecond, millisecond, 250*millisecond) }, 32, 1_500, 34, 25 * time.Second},
		"calm":     {func() *onceServer { return newOnceServer(2, 2*millisecond, millisecond, 0) }, 1, 100, 1, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := test.server()
				full, took := s.load(t, test.clients, test.visits)
				t.Logf("%d full %v in %v, the longest wait %v", full, s.fulls, took, s.waited)
				if full > test.full {
					t.Errorf("%d full handshakes, at most %d are right", full, test.full)
				}
				if took > test.took {
					t.Errorf("it took %v, longer than %v: tickets are missing", took, test.took)
				}
			})
		})
	}
}

// A server that was taken for one that takes each ticket once, because it lost
// its keys at the wrong moment, costs nothing more than until a full handshake
// would be due anyway.
func TestWrongVerdictIsReviewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newOnceServer(2, 20*millisecond, 10*millisecond, 0)
		s.many = true
		s.visit(t)
		r := s.store.find("a")
		r.learn(reuseOnce, time.Now())
		s.load(t, 32, 500)
		if r.reuse != reuseOnce {
			t.Error("it is tried again at once")
		}
		time.Sleep(reviewAfter)
		full, _ := s.load(t, 200, 1_000) // more than its tickets are for
		if r.reuse != reuseMany {
			t.Errorf("it is not tried again: %d full %v", full, s.fulls)
		}
	})
}
