package session

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/integration/peers"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// stock is a Jetty as people run it, whose certificate has two names.
type stock struct {
	t       *testing.T
	backend *peers.Backend
	client  *tls.Config
}

func startStock(t *testing.T, mode peers.Mode) *stock {
	t.Helper()
	authority, err := peers.NewAuthority("root")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	backend, err := peers.Jetty(ctx, peers.Options{Authority: authority, Dir: t.TempDir(), Mode: mode, CloseEach: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = backend.Stop() })
	return &stock{t, backend, &tls.Config{RootCAs: authority.Pool(), ServerName: peers.ServerName}}
}

// together makes n connections at the same time and counts how they went.
func (s *stock) together(store *Store, n int) (full int, by map[resealv1.Mechanism]int) {
	s.t.Helper()
	by = map[resealv1.Mechanism]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			mechanism, _, err := visit(s.t, store, s.backend.Address, "a", s.client)
			if err != nil {
				s.t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if mechanism == 0 {
				full++
			}
			by[mechanism]++
		})
	}
	wg.Wait()
	return full, by
}

// A Jetty that chooses certificates by SNI resumes TLS 1.2 by session ID when no
// ticket is asked for, which costs one full handshake to learn, once: not after a
// restart, and not on another edge.
func TestStockJettyTLS12(t *testing.T) {
	s := startStock(t, peers.TLS12Tickets)
	store := New(Config{})
	if full, by := s.together(store, 32); full != 2 || by[sessionID] != 30 {
		t.Fatalf("%d full, %v", full, by)
	}
	store = restart(t, store, false)
	other := New(Config{})
	if err := other.Adopt("a", "e1", deal(store, "a", 1, true)["a"][0], s.client); err != nil {
		t.Fatal(err)
	}
	for _, store := range []*Store{store, other} {
		if full, by := s.together(store, 16); full != 0 {
			t.Errorf("%d full, %v", full, by)
		}
	}
	// When the session is gone the way is still known.
	for name, store := range map[string]*Store{"running": other, "restarted": restart(t, store, false)} {
		r := store.find("a")
		store.mu.Lock()
		store.groups["a"].removeVersion(r, tls.VersionTLS12)
		store.mu.Unlock()
		store = restart(t, store, true)
		if full, by := s.together(store, 16); full != 1 || by[sessionID] != 15 {
			t.Errorf("%s: %d full, %v", name, full, by)
		}
	}
	counts, err := s.backend.Counts(t.Context())
	if err != nil || counts.Full != 4 {
		t.Errorf("the backend counts %+v, %v", counts, err)
	}
}

// In TLS 1.3 it takes each ticket once.
func TestStockJettyTLS13(t *testing.T) {
	s := startStock(t, peers.TLS13)
	store := New(Config{})
	if full, by := s.together(store, 48); full != 2 || by[psk] != 46 {
		t.Errorf("%d full, %v", full, by)
	}
	if full, by := s.together(restart(t, store, true), 32); full != 0 {
		t.Errorf("%d full, %v", full, by)
	}
}

// With a release of crypto/tls that behaves differently all goes the other way,
// at no cost.
func TestSessionIDsWithoutRand(t *testing.T) {
	t.Run("Jetty", func(t *testing.T) {
		s := startStock(t, peers.TLS12Tickets)
		store := New(Config{})
		store.sessionIDs = func() bool { return false }
		if full, by := s.together(store, 16); full != 2 || by[sessionID] != 14 {
			t.Fatalf("%d full, %v", full, by)
		}
	})
	t.Run("OpenSSL", func(t *testing.T) {
		address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
		cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
		store := New(Config{})
		store.sessionIDs = func() bool { return false }
		for i := range 4 {
			mechanism, miss, err := visit(t, store, address, "a", cfg)
			if err != nil || (mechanism == sessionID) != (i > 0) {
				t.Fatal(i, mechanism, miss, err)
			}
		}
		next := New(Config{})
		next.sessionIDs = store.sessionIDs
		if n, err := next.Import(store.Export(time.Now(), true), time.Now()); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if mechanism, miss, err := visit(t, next, address, "a", cfg); err != nil || mechanism != sessionID {
			t.Fatal(mechanism, miss, err)
		}
	})
}

// A server that declines every ID that it gave out costs one more connection only
// until that is known, and is tried again some time later.
func TestServerThatDeclinesItsIDs(t *testing.T) {
	first, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	second, more := opensslServer(t, "-no_ticket", "-tls1_2")
	visitBoth := func(store *Store, i int) (resealv1.Mechanism, resealv1.MissReason) {
		t.Helper()
		address, cfg := first, &tls.Config{RootCAs: roots, ServerName: "example.test"}
		if i%2 == 1 {
			address, cfg = second, &tls.Config{RootCAs: more, ServerName: "example.test"}
		}
		cfg.InsecureSkipVerify = true
		mechanism, miss, err := visit(t, store, address, "a", cfg)
		if err != nil {
			t.Fatal(err)
		}
		return mechanism, miss
	}
	store := New(Config{})
	for i, want := range []struct {
		miss resealv1.MissReason
		way  idWay
	}{
		{noSession, wayAsked}, {declined, wayBare}, {noSession, wayBare},
		{declined, wayBare}, {declined, wayNone}, {unsupported, wayNone}, {unsupported, wayNone},
	} {
		_, miss := visitBoth(store, i)
		if r := store.find("a"); miss != want.miss || r.way != want.way {
			t.Fatalf("connection %d: %v, way %d; want %v, %d", i, miss, r.way, want.miss, want.way)
		}
	}
	store.find("a").learned = time.Now().Add(-reviewAfter)
	for i, want := range []resealv1.Mechanism{0, sessionID, sessionID} {
		if mechanism, miss := visitBoth(store, 0); mechanism != want {
			t.Fatalf("when it has come to its senses, %d: %v, %v", i, mechanism, miss)
		}
	}
}

// A server that changes its version while its sessions go without the extension
// costs one full handshake.
func TestVersionChangesFromBareSession(t *testing.T) {
	old, _ := opensslServer(t, "-no_ticket", "-tls1_2")
	cfg := &tls.Config{InsecureSkipVerify: true, ServerName: "example.test"}
	for name, args := range map[string][]string{"either version": nil, "TLS 1.3 alone": {"-tls1_3"}} {
		t.Run(name, func(t *testing.T) {
			store := New(Config{})
			store.mu.Lock()
			_, r := store.use("a")
			r.goes(wayBare, time.Now())
			store.mu.Unlock()
			for _, want := range []resealv1.Mechanism{0, sessionID} {
				if mechanism, miss, err := visit(t, store, old, "a", cfg); err != nil || mechanism != want {
					t.Fatal(mechanism, miss, err)
				}
			}
			next, _ := opensslServer(t, args...)
			if _, miss, err := visit(t, store, next, "a", cfg); err != nil || miss != version {
				t.Fatal(miss, err)
			}
			if mechanism, miss, err := visit(t, store, next, "a", cfg); err != nil || mechanism != psk {
				t.Fatal(mechanism, miss, err)
			}
		})
	}
}

// Whoever may offer sessions by crypto/tls alone, because the server may
// renegotiate, does so even where others have learned another way, and declares
// nothing declined that only that way could offer.
func TestCryptoTLSAlone(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	for name, test := range map[string]struct {
		onTop bool                  // crypto/tls can offer session IDs
		want  [3]resealv1.Mechanism // of connections in turn
	}{
		"session IDs on top of crypto/tls": {true, [3]resealv1.Mechanism{sessionID, sessionID, sessionID}},
		"session IDs without it":           {false, [3]resealv1.Mechanism{}},
	} {
		t.Run(name, func(t *testing.T) {
			store := New(Config{})
			store.sessionIDs = func() bool { return test.onTop }
			store.mu.Lock()
			_, r := store.use("a")
			r.goes(wayBare, time.Now())
			store.mu.Unlock()
			for _, want := range []resealv1.Mechanism{0, sessionID} { // by others, who go bare
				if mechanism, miss, err := visit(t, store, address, "a", cfg); err != nil || mechanism != want {
					t.Fatal(mechanism, miss, err)
				}
			}
			for i, want := range test.want {
				attempt, err := store.Reserve(t.Context(), "a", exchange.Terms{Wait: patience, CryptoTLS: true})
				if err != nil {
					t.Fatal(err)
				}
				conn, err := net.Dial("tcp", address)
				if err != nil {
					t.Fatal(err)
				}
				tc, mechanism, miss, err := attempt.Handshake(t.Context(), conn, cfg)
				if err != nil || mechanism != want || miss == declined {
					t.Fatalf("connection %d: %v, %v, %v; want %v", i, mechanism, miss, err, want)
				}
				if _, plain := tc.(*tls.Conn); !plain {
					t.Errorf("connection %d is a %T", i, tc)
				}
				tc.Close()
			}
		})
	}
}
