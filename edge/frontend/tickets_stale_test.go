package frontend

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// ticketOf is the ticket in a client's session.
func ticketOf(t *testing.T, cache *oneCache) []byte {
	t.Helper()
	if cache.session == nil {
		return nil
	}
	ticket, _, err := cache.session.ResumptionState()
	if err != nil {
		t.Fatal(err)
	}
	return ticket
}

// puts counts the tickets that a client gets.
type puts struct {
	oneCache
	got int
}

func (p *puts) Put(key string, session *tls.ClientSessionState) {
	if session != nil {
		p.got++
		p.oneCache.Put(key, session)
	}
}

// TestStaleKeyring is a control plane that is away for longer than maxActiveAge:
// no ticket is issued any more, those that are there resume until retireAfter,
// and no connection fails.
func TestStaleKeyring(t *testing.T) {
	cert, _ := selfSigned(t, "app.test")
	for _, version := range bothVersions {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				said := ring("default", epoch(1, epochActive))
				said.MaxActiveAge, said.RetireAfter = durationpb.New(2*time.Hour), durationpb.New(3*time.Hour)
				keys := newKeys(t, said)
				close(keys.said)
				a := newAcceptor(keys.source, exchange.Listener{Name: "main", PolicyKey: "p", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}})
				visit := func(client *puts, want resealv1.MissReason, issued bool) {
					t.Helper()
					before := client.got
					got := a.connect(clientConfig("app.test", version, client))
					if got.serverErr != nil || got.clientErr != nil || got.miss != want || got.resumed() != (want == 0) {
						t.Errorf("after %s: %v %v, miss %v, resumed %v", time.Since(said.Epochs[0].Epoch.ActivatedAt.AsTime()),
							got.serverErr, got.clientErr, got.miss, got.resumed())
					}
					if (client.got > before) != issued {
						t.Errorf("%d tickets issued", client.got-before)
					}
				}
				client := &puts{}
				visit(client, notOffered, true)
				time.Sleep(time.Hour)
				visit(client, 0, true)
				held := ticketOf(t, &client.oneCache)

				time.Sleep(time.Hour + time.Minute)
				for range 3 {
					// TLS 1.2 can't resume without a ticket in answer: it is the same.
					visit(client, 0, version == tls.VersionTLS12)
				}
				if !bytes.Equal(ticketOf(t, &client.oneCache), held) {
					t.Error("the client has another ticket")
				}
				visit(&puts{}, staleKeyring, false)
				unknown := bytes.Clone(held)
				unknown[7] = 2 // an epoch that this edge never heard of
				visit(forged(t, client, unknown), staleKeyring, false)
				// As with a change of the key share after a HelloRetryRequest.
				a.tls.CurvePreferences = []tls.CurveID{tls.CurveP384}
				for _, c := range []*puts{client, {}} {
					config := clientConfig("app.test", version, c)
					config.CurvePreferences = []tls.CurveID{tls.CurveP256, tls.CurveP384}
					if got := a.connect(config); got.serverErr != nil || got.clientErr != nil || got.resumed() != (c == client) {
						t.Errorf("after a second hello: %v %v, resumed %v, miss %v", got.serverErr, got.clientErr, got.resumed(), got.miss)
					}
				}
				a.tls.CurvePreferences = nil

				time.Sleep(3 * time.Hour)
				visit(client, keyRetired, false)
			})
		})
	}
}

// forged is a client with a ticket of its own making.
func forged(t *testing.T, of *puts, ticket []byte) *puts {
	t.Helper()
	_, state, err := of.session.ResumptionState()
	if err != nil {
		t.Fatal(err)
	}
	// A copy: NewResumptionState would give the ticket to the original, too.
	state = must[*tls.SessionState](t)(tls.ParseSessionState(must[[]byte](t)(state.Bytes())))
	session, err := tls.NewResumptionState(ticket, state)
	if err != nil {
		t.Fatal(err)
	}
	return &puts{oneCache: oneCache{session}}
}

// TestRotation: edges that hold the same epochs in different roles take each
// other's tickets, and an epoch that is revoked ends at once, without an error.
func TestRotation(t *testing.T) {
	cert, _ := selfSigned(t, "app.test")
	l := exchange.Listener{Name: "main", PolicyKey: "p", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}
	for _, version := range bothVersions {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			behind := newKeys(t, ring("default", epoch(1, epochActive), epoch(2, epochPrepared)))
			ahead := newKeys(t, ring("default", epoch(1, epochRetired), epoch(2, epochActive)))
			edges := []*acceptor{newAcceptor(behind.source, l), newAcceptor(ahead.source, l)}
			cache := &oneCache{}
			for i := range 8 {
				got := edges[i%2].connect(clientConfig("app.test", version, cache))
				if got.serverErr != nil || got.resumed() != (i > 0) || ticketOf(t, cache)[7] != byte(i%2+1) {
					t.Errorf("visit %d: %v, miss %v, ticket of epoch %d", i, got.serverErr, got.miss, ticketOf(t, cache)[7])
				}
			}
			// The client's ticket is of epoch 2.
			ahead.say(ring("default", epoch(3, epochActive)))
			eventually(t, "epoch 3 is in force", func() bool {
				ticket, ok := ahead.Keys("default", "main", "p").Wrap(nil, "")
				return ok && ticket[7] == 3
			})
			for _, want := range []resealv1.MissReason{keyRetired, 0} {
				if got := edges[1].connect(clientConfig("app.test", version, cache)); got.serverErr != nil || got.miss != want {
					t.Errorf("after the revocation: %v, miss %v, want %v", got.serverErr, got.miss, want)
				}
			}
		})
	}
}

// failing are keys that stop issuing in the middle of handshakes.
type failing struct {
	TicketKeys
	fail bool
}

func (f *failing) Issuing() bool { return true }

func (f *failing) Wrap(state []byte, sni string) ([]byte, bool) {
	if f.fail {
		return nil, false
	}
	return f.TicketKeys.Wrap(state, sni)
}

// TestKeysEndDuringHandshake: what a client is given in place of a ticket must
// break neither this handshake nor the next.
func TestKeysEndDuringHandshake(t *testing.T) {
	cert, _ := selfSigned(t, "app.test")
	for _, version := range bothVersions {
		keys := &failing{TicketKeys: newKeys(t, ring("default", epoch(1, epochActive))).source("", "main", "p")}
		a := newAcceptor(func(string, string, string) TicketKeys { return keys },
			exchange.Listener{Name: "main", PolicyKey: "p", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}})
		cache := &oneCache{}
		wants := []resealv1.MissReason{notOffered, 0, 0, keyUnknown} // TLS 1.2 keeps its ticket
		if version == tls.VersionTLS12 {
			wants = []resealv1.MissReason{notOffered, 0, 0, 0}
		}
		for i, want := range wants {
			keys.fail = i >= 2
			if got := a.connect(clientConfig("app.test", version, cache)); got.serverErr != nil || got.clientErr != nil || got.miss != want {
				t.Errorf("%s, visit %d: %v %v, miss %v, want %v", tls.VersionName(version), i, got.serverErr, got.clientErr, got.miss, want)
			}
		}
	}
}

func TestWrapNeverFails(t *testing.T) {
	shared := sharedKeys{newKeys(t, ring("default", epoch(1, epochActive))).source("", "main", "p")}
	none := sharedKeys{newKeys(t).source("", "main", "p")}
	for name, keys := range map[string]ticketKeys{"own": newTickets().context("main", "p"), "shared": shared, "none": none} {
		h := (&ticketPolicy{keys: keys, lifetime: time.Hour}).handshake()
		for _, session := range []*tls.SessionState{{}, {Extra: [][]byte{make([]byte, 1<<17)}}, {Extra: [][]byte{make([]byte, 1<<24)}}} {
			ticket, err := h.wrap(tls.ConnectionState{}, session)
			if err != nil || len(ticket) == 0 || len(ticket) > maxTicket {
				t.Errorf("%s: %d bytes, %v", name, len(ticket), err)
			}
		}
		for _, ticket := range [][]byte{nil, []byte("damaged"), make([]byte, 200)} {
			h := (&ticketPolicy{keys: keys, lifetime: time.Hour}).handshake()
			h.cfg = &tls.Config{}
			if session, err := h.unwrap(ticket, tls.ConnectionState{}); session != nil || err != nil || len(ticket) > 0 && h.miss == notOffered {
				t.Errorf("%s: %v %v %v", name, session, err, h.miss)
			}
		}
	}
	// A ticket that opens but holds no session of this Go release, or none of
	// ours.
	for _, state := range [][]byte{nil, []byte("no session"), must[[]byte](t)((&tls.SessionState{}).Bytes())} {
		ticket, _ := shared.Wrap(state, "")
		h := (&ticketPolicy{keys: shared, lifetime: time.Hour}).handshake()
		if session, err := h.unwrap(ticket, tls.ConnectionState{}); session != nil || err != nil || h.miss != resealv1.MissReason_MISS_REASON_UNDECRYPTABLE {
			t.Errorf("a ticket of %q: %v %v %v", state, session, err, h.miss)
		}
	}
}

// TestCryptoTLS holds crypto/tls to what the handling of tickets relies on. Go
// promises none of it.
func TestCryptoTLS(t *testing.T) {
	cert, _ := selfSigned(t, "app.test")
	keys := &tls.Config{}
	type seen struct {
		wraps, unwraps int
		extra          [][]byte
	}
	// run makes a handshake; unwrapped is called after a ticket is opened.
	run := func(t *testing.T, version uint16, cache tls.ClientSessionCache, unwrapped func(*tls.Config), wrap func([]byte) ([]byte, error)) (seen, accept) {
		var s seen
		cfg := &tls.Config{Certificates: []tls.Certificate{cert}}
		cfg.UnwrapSession = func(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
			s.unwraps++
			session, err := keys.DecryptTicket(ticket, cs)
			unwrapped(cfg)
			return session, err
		}
		cfg.WrapSession = func(cs tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
			s.wraps++
			s.extra = slices.Clone(session.Extra)
			session.Extra = append(session.Extra, []byte("mark"))
			ticket, err := keys.EncryptTicket(cs, session)
			if err != nil {
				return nil, err
			}
			return wrap(ticket)
		}
		ours, theirs := bufferedPipe()
		var result accept
		done := make(chan struct{})
		conn := tls.Server(theirs, &tls.Config{SessionTicketsDisabled: true, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return cfg, nil }})
		go func() {
			defer close(done)
			defer theirs.Close()
			if result.serverErr = conn.Handshake(); result.serverErr == nil {
				_, _ = conn.Write([]byte("x"))
			}
		}()
		client := tls.Client(ours, clientConfig("app.test", version, cache))
		_, result.clientErr = client.Read(make([]byte, 1))
		ours.Close()
		<-done
		result.server = conn.ConnectionState()
		return s, result
	}
	nothing, pass := func(*tls.Config) {}, func(ticket []byte) ([]byte, error) { return ticket, nil }
	disable := func(cfg *tls.Config) { cfg.SessionTicketsDisabled = true }
	for _, version := range bothVersions {
		is12 := version == tls.VersionTLS12
		t.Run(tls.VersionName(version), func(t *testing.T) {
			client := &puts{}
			if s, got := run(t, version, client, nothing, pass); got.serverErr != nil || s.wraps != 1 || (s.unwraps == 1) != is12 {
				t.Errorf("full: %+v %v", s, got.serverErr)
			}
			for range 2 { // the mark of the session before is not there again
				if s, got := run(t, version, client, nothing, pass); !got.server.DidResume || s.wraps != 1 || s.unwraps != 1 || len(s.extra) != 0 {
					t.Errorf("resumed: %+v %v", s, got.serverErr)
				}
			}
			// Disabled after unwrap: it is still resumed; TLS 1.2 wraps anyway.
			before := client.got
			s, got := run(t, version, client, disable, pass)
			if !got.server.DidResume || got.clientErr != nil || (s.wraps == 1) != is12 || (client.got > before) != is12 {
				t.Errorf("disabled while resuming: %+v %v, %d tickets", s, got.serverErr, client.got-before)
			}
			// TLS 1.2 asks to unwrap without a ticket; a full handshake then issues
			// none.
			fresh := &puts{}
			if s, got := run(t, version, fresh, disable, pass); got.serverErr != nil || is12 && (s.wraps != 0 || fresh.got != 0) {
				t.Errorf("disabled in a full handshake: %+v %v", s, got.serverErr)
			}
			refuse := func([]byte) ([]byte, error) { return nil, errors.New("no") }
			if _, got := run(t, version, &puts{}, nothing, refuse); got.serverErr == nil {
				t.Error("an error from WrapSession no longer ends the handshake")
			}
			empty := func([]byte) ([]byte, error) { return nil, nil }
			if _, got := run(t, version, &puts{}, nothing, empty); (got.clientErr == nil) != is12 {
				t.Errorf("a client that gets an empty ticket: %v", got.clientErr)
			}
		})
	}
}

func FuzzExtra(f *testing.F) {
	f.Add([]byte(extraMark), "x")
	f.Add(extra{time.Unix(1, 0), (&ticketPolicy{}).binding("app.test")}.encode(), "y")
	f.Fuzz(func(t *testing.T, entry []byte, sni string) {
		readExtra([][]byte{entry})
		want := extra{time.Unix(int64(len(entry)), 0), (&ticketPolicy{}).binding(sni)}
		if got, ok := readExtra([][]byte{{}, []byte("another's"), want.encode()}); !ok || got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	})
}

// TestHelloDecides: what is in force when a client says hello counts, not what
// was when it connected.
func TestHelloDecides(t *testing.T) {
	ca := newAuthority(t)
	cert, _ := selfSigned(t, "app.test")
	keys := newKeys(t, ring("default", epoch(1, epochActive)))
	e := newSharedEdge(t, keys)
	shown := ca.client(t, 2)
	e.apply(configured(t, "main", cert, clientAuth(authRequire, ca.pem, "")))
	cache := &oneCache{}
	showing := func(c *tls.Config) { c.InsecureSkipVerify, c.Certificates = true, []tls.Certificate{shown} }
	for i := range 2 {
		if got := e.visit(withCache(cache), showing); got.DidResume != (i == 1) {
			t.Fatalf("visit %d resumed %v", i, got.DidResume)
		}
	}
	early := must[net.Conn](t)(net.Dial("tcp", e.address("main")))
	defer early.Close()
	eventually(t, "the connection is accepted", func() bool { return read(e.count("main"), func(c *counts) bool { return c.opened == 3 }) })
	e.apply(configured(t, "main", cert, clientAuth(authRequire, ca.pem, ca.revoke(t, shown))))
	client := tls.Client(early, &tls.Config{ServerName: "app.test", InsecureSkipVerify: true, ClientSessionCache: cache, Certificates: []tls.Certificate{shown}})
	fmt.Fprint(client, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("a revoked client got in on a connection from before")
	}
	// The client has its alert before the edge counts.
	eventually(t, "the handshake is counted as failed", func() bool { return read(e.count("main"), func(c *counts) bool { return c.failed == 1 }) })
}
