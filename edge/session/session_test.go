package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	noSession    = resealv1.MissReason_MISS_REASON_NO_SESSION
	expired      = resealv1.MissReason_MISS_REASON_EXPIRED
	declined     = resealv1.MissReason_MISS_REASON_DECLINED
	afterUnclean = resealv1.MissReason_MISS_REASON_DECLINED_AFTER_UNCLEAN_CLOSE
	evicted      = resealv1.MissReason_MISS_REASON_EVICTED
	spent        = resealv1.MissReason_MISS_REASON_SINGLE_USE_SPENT
	version      = resealv1.MissReason_MISS_REASON_VERSION_CHANGED
	policy       = resealv1.MissReason_MISS_REASON_POLICY_CHANGED
	unsupported  = resealv1.MissReason_MISS_REASON_UNSUPPORTED_BY_PEER
	disabled     = resealv1.MissReason_MISS_REASON_DISABLED
	psk          = resealv1.Mechanism_MECHANISM_PSK
	ticket       = resealv1.Mechanism_MECHANISM_TICKET
)

// issue makes a certificate for "example.test" valid until notAfter, and the
// pool that trusts it.
func issue(t testing.TB, notAfter time.Time) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "example.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter, DNSNames: []string{"example.test"},
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
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

// peer is a TLS server whose configuration can change between connections.
type peer struct {
	t      testing.TB
	server *tls.Config
	client *tls.Config
	store  *Store
}

func newPeer(t testing.TB, cfg Config) *peer {
	cert, roots := issue(t, time.Now().Add(time.Hour))
	return &peer{
		t:      t,
		server: &tls.Config{Certificates: []tls.Certificate{cert}},
		client: &tls.Config{RootCAs: roots, ServerName: "example.test"},
		store:  New(cfg),
	}
}

type result struct {
	mechanism resealv1.Mechanism
	miss      resealv1.MissReason
	err       error
	resumed   bool // as the server saw it
}

// patience is how long handshakes wait for others: longer than those take on a
// busy machine.
const patience = 10 * time.Second

// dial makes one connection: handshake, one byte from the server (so that
// tickets are read), clean close.
func (p *peer) dial(identity exchange.Identity) result {
	r, closeBoth := p.open(identity, true)
	closeBoth()
	return r
}

func (p *peer) open(identity exchange.Identity, read bool) (result, func()) {
	p.t.Helper()
	attempt, err := p.store.Reserve(p.t.Context(), identity, exchange.Terms{Wait: patience, TicketWait: time.Minute})
	if err != nil {
		p.t.Fatal(err)
	}
	near, far, wait := p.serve()
	tc, mechanism, miss, err := attempt.Handshake(p.t.Context(), near, p.client)
	r := result{mechanism: mechanism, miss: miss, err: err}
	if err == nil && read {
		if _, err := io.ReadFull(tc, make([]byte, 1)); err != nil {
			p.t.Fatal(err)
		}
		go tc.Read(make([]byte, 1))
	}
	if err != nil {
		near.Close()
	}
	state := wait()
	r.resumed = state.DidResume
	return r, func() {
		if err == nil {
			tc.NetConn().Close()
		}
		near.Close()
		far.Close()
	}
}

// serve starts the server's side of a TCP connection.
func (p *peer) serve() (near, far net.Conn, wait func() tls.ConnectionState) {
	p.t.Helper()
	near, far = tcpPair(p.t)
	server := tls.Server(far, p.server)
	done := make(chan tls.ConnectionState, 1)
	go func() {
		if server.HandshakeContext(context.Background()) == nil {
			server.Write([]byte("x"))
		} else {
			far.Close()
		}
		done <- server.ConnectionState()
	}()
	return near, far, func() tls.ConnectionState { return <-done }
}

func tcpPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

func (p *peer) want(identity exchange.Identity, mechanism resealv1.Mechanism, miss resealv1.MissReason) {
	p.t.Helper()
	r := p.dial(identity)
	if r.err != nil {
		p.t.Fatal(r.err)
	}
	if r.mechanism != mechanism || r.miss != miss {
		p.t.Fatalf("got %v, %v; want %v, %v", r.mechanism, r.miss, mechanism, miss)
	}
	if r.resumed != (mechanism != 0) {
		p.t.Fatalf("we say %v, the server says resumed = %v", r.mechanism, r.resumed)
	}
}

func TestResumption(t *testing.T) {
	for name, c := range map[string]struct {
		max       uint16
		mechanism resealv1.Mechanism
	}{"1.2": {tls.VersionTLS12, ticket}, "1.3": {tls.VersionTLS13, psk}} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, Config{})
			p.server.MaxVersion = c.max
			p.want("a|1", 0, noSession)
			for range 5 {
				p.want("a|1", c.mechanism, 0)
			}
			p.want("a|2", 0, noSession) // another identity never shares
			p.want("b|1", 0, noSession)
			p.store.Forget("a")
			p.want("a|1", 0, noSession)
			p.want("a|2", 0, noSession)
			p.want("b|1", c.mechanism, 0)
		})
	}
}

func TestDeclined(t *testing.T) {
	for name, max := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, Config{})
			p.server.MaxVersion = max
			p.want("a", 0, noSession)
			p.server = p.server.Clone() // other ticket keys
			p.server.SetSessionTicketKeys([][32]byte{{1}})
			p.want("a", 0, declined)
			p.store.Unclean("a")
			p.server.SetSessionTicketKeys([][32]byte{{2}})
			p.want("a", 0, afterUnclean)
			p.server.SetSessionTicketKeys([][32]byte{{3}})
			p.want("a", 0, declined)
		})
	}
}

func TestUncleanBeforeSuccessfulResumptionIsForgiven(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a", 0, noSession)
	p.store.Unclean("a")
	p.want("a", ticket, 0)
	p.server = p.server.Clone()
	p.server.SetSessionTicketKeys([][32]byte{{1}})
	p.want("a", 0, declined)
}

func TestVersionChanged(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.SetSessionTicketKeys([][32]byte{{1}})
	p.want("a", 0, noSession)
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a", 0, version)
	p.want("a", ticket, 0)
	p.server.MaxVersion = tls.VersionTLS13
	p.want("a", 0, version)
	p.want("a", psk, 0)
}

func TestUnsupportedByPeer(t *testing.T) {
	for name, max := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, Config{})
			p.server.MaxVersion = max
			p.server.SessionTicketsDisabled = true
			r, closeBoth := p.open("a", true)
			if r.miss != noSession {
				t.Fatal(r)
			}
			defer closeBoth()
			deadline := time.Now().Add(5 * time.Second)
			for !p.withheld("a") {
				if time.Now().After(deadline) {
					t.Fatal("never noticed")
				}
				time.Sleep(time.Millisecond)
			}
			p.want("a", 0, unsupported)
			p.server.SessionTicketsDisabled = false
		})
	}
}

func (p *peer) withheld(identity exchange.Identity) bool {
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	r := p.store.find(identity)
	return r != nil && r.newest != nil && r.newest.withheld()
}

func TestConnectionThatWasNotReadDoesNotCountAsUnsupported(t *testing.T) {
	p := newPeer(t, Config{})
	for range 2 {
		r, closeBoth := p.open("a", false)
		if r.miss != noSession {
			t.Fatal(r)
		}
		closeBoth()
	}
}

func TestDisabled(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("a", 0, noSession)
	p.client.SessionTicketsDisabled = true
	p.want("a", 0, disabled)
}

func TestExpired(t *testing.T) {
	t.Run("lifetime", func(t *testing.T) {
		p := newPeer(t, Config{})
		p.want("a", 0, noSession)
		p.store.mu.Lock()
		for _, h := range p.store.find("a").sessions {
			if left := time.Until(h.useBy); left < maxLifetime13-time.Minute || left > maxLifetime13 {
				t.Errorf("lifetime %v, Go's servers give 7 days", left)
			}
			h.useBy = time.Now().Add(-time.Second)
		}
		p.store.mu.Unlock()
		p.want("a", 0, expired)
		p.want("a", psk, 0)
	})
	t.Run("certificate", func(t *testing.T) {
		p := newPeer(t, Config{})
		p.want("a", 0, noSession)
		p.client.Time = func() time.Time { return time.Now().Add(2 * time.Hour) }
		if r := p.dial("a"); r.err == nil {
			t.Fatal("an expired certificate passed")
		}
		p.client.Time = nil
		p.want("a", 0, expired)
	})
}

func TestPolicyChanged(t *testing.T) {
	p := newPeer(t, Config{})
	insecure := p.client.Clone()
	insecure.InsecureSkipVerify = true
	secure := p.client
	p.client = insecure
	p.want("a", 0, noSession)
	p.client = secure
	p.want("a", 0, policy) // crypto/tls does not offer an unverified session
	p.want("a", psk, 0)
}

// A pool whose trust or policy changes has new identities, whose first handshakes
// are full because of that.
func TestReplace(t *testing.T) {
	p := newPeer(t, Config{MaxIdentities: 4})
	for _, name := range []string{"0", "1", "2"} {
		p.want(exchange.Identity("old|"+name), 0, noSession)
	}
	p.store.mu.Lock()
	for _, h := range p.store.find("old|1").sessions {
		h.useBy = time.Now().Add(-time.Second)
	}
	p.store.mu.Unlock()
	all := []string{"0", "1", "2", "3"}
	p.store.Replace("old", "new", all)
	p.want("old|2", psk, 0) // another pool may have the same identity
	p.store.Forget("old")
	p.want("new|0", 0, policy)
	p.want("new|0", psk, 0)
	p.want("new|1", 0, noSession) // it had none that could be used
	p.want("new|3", 0, noSession)
	// What was not dialled in between is carried on, and back again.
	p.store.Replace("new", "old", all)
	p.store.Forget("new")
	p.want("old|2", 0, policy)
	p.want("old|0", 0, policy)
	p.store.Replace("none", "old", all)
	p.store.Replace("old", "old", all)
	p.want("old|0", psk, 0)
}

// Pools that look alike are in one group. When one of them changes, what the
// others had says nothing about it, and takes no room in what is remembered.
func TestReplaceOfOnePool(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("old|one:443|name", 0, noSession)
	p.want("old|one:443|name|http/1.1", 0, noSession)
	p.want("old|two:443|name", 0, noSession)
	p.store.Replace("old", "new", []string{"one:443"})
	p.want("new|two:443|name", 0, noSession) // a third pool's first contact
	p.want("new|one:443|name", 0, policy)
	p.want("new|one:443|name|http/1.1", 0, policy)
	p.want("old|two:443|name", psk, 0)

	p = newPeer(t, Config{MaxIdentities: 2})
	for _, name := range []string{"a", "b", "c"} {
		p.want(exchange.Identity("new|one:443|"+name), 0, noSession)
	}
	p.want("old|two:443|a", 0, noSession)
	p.want("old|two:443|b", 0, noSession)
	p.store.Replace("old", "new", []string{"one:443"})
	p.want("new|one:443|a", 0, evicted)
}

// A server that takes each ticket once: the ticket is remembered in Extra by
// its creation order, and a second use is a full handshake.
func TestSingleUse(t *testing.T) {
	p := newPeer(t, Config{})
	var mu sync.Mutex
	seen := map[string]bool{}
	give := true
	base := p.server
	p.server = base.Clone()
	p.server.UnwrapSession = func(identity []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		mu.Lock()
		defer mu.Unlock()
		if seen[string(identity)] {
			return nil, nil
		}
		seen[string(identity)] = true
		if !give {
			base.SessionTicketsDisabled = true
		}
		return base.DecryptTicket(identity, cs)
	}
	p.server.WrapSession = func(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
		return base.EncryptTicket(cs, ss)
	}
	p.want("a", 0, noSession)
	p.want("a", psk, 0)
	spend := func() *held {
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		sessions := p.store.find("a").sessions
		sessions[len(sessions)-1].taken = 1
		sessions[len(sessions)-1].accepted = 1
		return sessions[len(sessions)-1]
	}
	h := spend()
	seen[ticketOf(t, h)] = true
	p.want("a", 0, declined) // only now do we know
	spend()
	p.want("a", 0, spent)
	p.want("a", psk, 0) // the new ticket is unused
}

func ticketOf(t *testing.T, h *held) string {
	ticket, _, err := h.state.ResumptionState()
	if err != nil {
		t.Fatal(err)
	}
	return string(ticket)
}

func TestTakeIsAtomicAndPrefersUnused(t *testing.T) {
	p := newPeer(t, Config{})
	near := []func(){}
	for range 4 { // four open connections give four tickets
		_, closeBoth := p.openFull("a")
		near = append(near, closeBoth)
	}
	for _, f := range near {
		f()
	}
	taken := map[*held]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			o := p.store.takeNow("a")
			mu.Lock()
			defer mu.Unlock()
			taken[o.session]++
		})
	}
	wg.Wait()
	if len(taken) != 4 || taken[nil] != 0 {
		t.Fatalf("4 takes of 4 tickets: %v", taken)
	}
	if o := p.store.takeNow("a"); o.session == nil {
		t.Fatal("the newest used ticket is not offered again")
	}
}

// openFull makes a full handshake whatever the store holds.
func (p *peer) openFull(identity exchange.Identity) (result, func()) {
	near, far, wait := p.serve()
	tc, mechanism, miss, err := p.store.shake(p.t.Context(), near, identity, p.client, offer{miss: noSession})
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := io.ReadFull(tc, make([]byte, 1)); err != nil {
		p.t.Fatal(err)
	}
	state := wait()
	return result{mechanism: mechanism, miss: miss, resumed: state.DidResume}, func() { near.Close(); far.Close() }
}

func TestBounds(t *testing.T) {
	t.Run("identities", func(t *testing.T) {
		p := newPeer(t, Config{MaxIdentities: 2})
		for i := range 3 {
			p.want(exchange.Identity("g|"+strconv.Itoa(i)), 0, noSession)
		}
		p.want("g|2", psk, 0)
		p.want("g|0", 0, evicted)
		p.want("h|0", 0, noSession) // another group has its own bound
		p.want("g|0", psk, 0)
	})
	t.Run("sessions", func(t *testing.T) {
		p := newPeer(t, Config{MaxSessions: 3})
		for range 5 {
			_, closeBoth := p.openFull("a")
			closeBoth()
		}
		if n := len(p.store.find("a").sessions); n != 3 {
			t.Fatalf("%d sessions, want 3", n)
		}
	})
	t.Run("bytes", func(t *testing.T) {
		p := newPeer(t, Config{MaxBytes: 2500})
		for i := range 8 {
			p.want(exchange.Identity("g|"+strconv.Itoa(i)), 0, noSession)
		}
		g := p.store.groups["g"]
		if g.bytes > 2500 || len(g.records) >= 8 {
			t.Fatalf("%d bytes in %d identities", g.bytes, len(g.records))
		}
		p.want("g|0", 0, evicted)
	})
}

// A server that breaks the handshake whenever a session is offered costs one
// more connection, never an error.
func TestFailedResumptionIsRedoneInFull(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a", 0, noSession)
	broken := p.server.Clone()
	broken.UnwrapSession = func(ticket []byte, _ tls.ConnectionState) (*tls.SessionState, error) {
		if len(ticket) == 0 {
			return nil, nil
		}
		return nil, errors.New("broken")
	}
	p.server = broken
	r := p.dial("a")
	var failure *ResumptionError
	if !errors.As(r.err, &failure) {
		t.Fatalf("got %v", r.err)
	}
	near, _, wait := p.serve()
	tc, mechanism, miss, err := failure.FullHandshake(t.Context(), near)
	if err != nil || mechanism != 0 || miss != declined {
		t.Fatal(mechanism, miss, err)
	}
	if _, err := io.ReadFull(tc, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	wait()
}

func TestFailureWithoutSessionIsPlain(t *testing.T) {
	p := newPeer(t, Config{})
	p.client.RootCAs = x509.NewCertPool()
	r := p.dial("a")
	var failure *ResumptionError
	if r.err == nil || errors.As(r.err, &failure) {
		t.Fatalf("got %v", r.err)
	}
}

// Whatever happens between two handshakes, each is resumed or has one reason.
func TestEveryHandshakeHasOneExplanation(t *testing.T) {
	p := newPeer(t, Config{MaxSessions: 2, MaxIdentities: 3})
	cert := p.server.Certificates
	rapid.Check(t, func(rt *rapid.T) {
		p.store = New(Config{MaxSessions: 2, MaxIdentities: 3})
		for range rapid.IntRange(1, 12).Draw(rt, "dials") {
			identity := exchange.Identity("g|" + rapid.StringMatching(`[a-d]`).Draw(rt, "identity"))
			if rapid.Bool().Draw(rt, "restart") {
				max := rapid.SampledFrom([]uint16{tls.VersionTLS12, tls.VersionTLS13}).Draw(rt, "version")
				p.server = &tls.Config{Certificates: cert, MaxVersion: max,
					SessionTicketsDisabled: rapid.Bool().Draw(rt, "no tickets")}
			}
			if rapid.Bool().Draw(rt, "unclean") {
				p.store.Unclean(identity)
			}
			r := p.dial(identity)
			if r.err != nil {
				rt.Fatal(r.err)
			}
			if (r.mechanism == 0) == (r.miss == 0) || r.resumed != (r.mechanism != 0) {
				rt.Fatalf("mechanism %v, miss %v, server resumed %v", r.mechanism, r.miss, r.resumed)
			}
		}
	})
}

func FuzzOffersSession(f *testing.F) {
	f.Add([]byte{22, 3, 1, 0, 4, 1, 0, 0, 0})
	f.Add([]byte{22, 3, 1, 0, 2, 1, 0, 22, 3, 1, 0, 2, 0, 0})
	f.Fuzz(func(_ *testing.T, b []byte) { offersSession(b, nil) })
}

// begin takes an offer that must be there at once.
func (s *Store) begin(t *testing.T, identity exchange.Identity) offer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	o, err := s.acquire(ctx, identity, exchange.Terms{Wait: time.Hour, TicketWait: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// takeNow takes an offer without waiting, and expects nothing of it.
func (s *Store) takeNow(identity exchange.Identity) offer {
	taken, _ := s.acquire(context.Background(), identity, exchange.Terms{})
	taken.pending.settle()
	return taken
}
