// Package share exchanges TLS sessions with the other edges of a pool, through
// the control plane, which can't read them: each is sealed to one edge and
// signed. reseal.v1.SessionService has the contract.
package share

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/link"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Sessions are the sessions that this edge holds. *session.Store is one. Groups
// are those of identities.
type Sessions interface {
	// Watch returns a channel that gets a value after sessions came or went.
	Watch() (changes <-chan struct{}, stop func())
	// Holds reports whether there are sessions of a group to deal, spare ones, that
	// no other edge was given, and among these tickets that are taken once.
	Holds(group string) (some, spare, stock bool)
	// Fresh reports whether Deal without seed may have something to give. It
	// costs nothing.
	Fresh(group string) bool
	// Deal returns per identity what each of recipients edges gets, nil for
	// nothing: with seed 0 new sessions, otherwise all, but at most seed tickets that
	// are taken once.
	Deal(group string, recipients, seed int) iter.Seq2[exchange.Identity, [][]byte]
	// Adopt takes in what Deal of another edge gave. cfg verifies it.
	Adopt(identity exchange.Identity, sender string, data []byte, cfg *tls.Config) error
	// Expel drops what came from or through an edge.
	Expel(edge string)
}

// Pool is a pool with sharing: fleet.
type Pool struct {
	// Name is metadata.name.
	Name string
	// Group is that of its sessions' identities. No other pool has the same, or
	// their sessions would be shared too.
	Group string
	// TLS returns the configuration of full handshakes of an identity, or nil
	// when nothing in this edge's plan leads to it. Required.
	TLS func(identity exchange.Identity) *tls.Config
}

// Config is what a Share needs. It is read once, by New.
type Config struct {
	// Edge is the edge's id, as in its certificate. Required.
	Edge string
	// BootID is random per start of the process. Required.
	BootID string
	// Labels are matched by selectors.
	Labels map[string]string
	// Client calls the control plane. Required.
	Client resealv1.SessionServiceClient
	// Credentials are the edge's current certificate, its key, ECDSA P-256, and
	// the fleet's authority; ok is false when there are none. Required.
	Credentials func() (certificate *x509.Certificate, key *ecdsa.PrivateKey, roots *x509.CertPool, ok bool)
	// Sessions are given and taken. Required.
	Sessions Sessions
	// Logger is for the operator of this process. Default: nowhere.
	Logger *slog.Logger
}

// Share is an edge's side of the SessionService.
type Share struct {
	cfg      Config
	trust    *trust
	replays  *replays
	changed  chan struct{}  // the pools have changed
	refusals rate.Sometimes // of being logged

	mu    sync.Mutex
	pools map[string]Pool
	// cold are the pools that came new with the last Update, and of which other
	// edges have not said yet what they hold. ready is closed while there are none.
	cold  map[string]bool
	ready chan struct{}
}

// New makes a Share that does nothing before Run.
func New(cfg Config) *Share {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Share{
		cfg:      cfg,
		trust:    &trust{},
		replays:  &replays{origins: map[string]*seen{}},
		ready:    make(chan struct{}),
		changed:  make(chan struct{}, 1),
		refusals: rate.Sometimes{First: 3, Interval: 30 * time.Second},
	}
}

// Update replaces the pools. It may be called before Run and at any time. While
// there are none, nothing is exchanged.
func (s *Share) Update(pools []Pool) {
	next := make(map[string]Pool, len(pools))
	for _, pool := range pools {
		next[pool.Name] = pool
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	same := maps.EqualFunc(s.pools, next, func(a, b Pool) bool { return a.Group == b.Group })
	first := s.pools == nil
	s.cold = map[string]bool{}
	for name := range next {
		if _, known := s.pools[name]; !known {
			s.cold[name] = true
		}
	}
	s.pools = next
	s.signalReady()
	if !same || first {
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
}

// Ready is closed when there is nothing to wait for before the edge connects to
// the pools of the last Update: other edges have sent what they hold of those
// that came new, or hold nothing. It stays open while the control plane can't be
// reached: wait a moment, not for ever. It is for the time until the next Update.
func (s *Share) Ready() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready
}

// seeded notes that other edges have sent what they hold of pools.
func (s *Share) seeded(pools []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range pools {
		delete(s.cold, name)
	}
	s.signalReady()
}

// signalReady closes ready when no pool is cold, and replaces it when one is
// again. s.mu is held.
func (s *Share) signalReady() {
	select {
	case <-s.ready:
		if len(s.cold) > 0 {
			s.ready = make(chan struct{})
		}
	default:
		if len(s.cold) == 0 {
			close(s.ready)
		}
	}
}

// pool returns a pool by name.
func (s *Share) pool(name string) (Pool, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pool, ok := s.pools[name]
	return pool, ok
}

// poolList is the pools sorted by name.
func (s *Share) poolList() []Pool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Pool
	for _, name := range slices.Sorted(maps.Keys(s.pools)) {
		list = append(list, s.pools[name])
	}
	return list
}

func poolNames(pools []Pool) []string {
	var names []string
	for _, pool := range pools {
		names = append(names, pool.Name)
	}
	return names
}

// Run exchanges sessions until ctx ends, over as many streams as that takes. An
// unreachable control plane is not an error. It returns nil.
func (s *Share) Run(ctx context.Context) error {
	link.Keep(ctx, s.serve, func(err error, again time.Duration) {
		s.cfg.Logger.Warn("sessions are not shared for now", "error", err, "again_in", again)
	})
	return nil
}

// serve waits for pools and runs one stream to its end; nil when there are no pools
// any more, or ctx has ended.
func (s *Share) serve(ctx context.Context) error {
	for len(s.poolList()) == 0 {
		select {
		case <-ctx.Done():
			return nil
		case <-s.changed:
		}
	}
	err := s.exchange(ctx)
	switch {
	case errors.Is(err, errNoPools):
		return nil
	case status.Code(err) == codes.Unimplemented:
		s.seeded(poolNames(s.poolList()))
	}
	return err
}
