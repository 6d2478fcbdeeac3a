package session

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// deal is what recipients get in one round, by identity.
func deal(store *Store, group string, recipients int, seed bool) map[exchange.Identity][][]byte {
	got := map[exchange.Identity][][]byte{}
	most := 0
	if seed {
		most = maxOfferItems
	}
	for identity, containers := range store.Deal(group, recipients, most) {
		got[identity] = containers
	}
	return got
}

func holds(store *Store, group string) bool {
	some, _, _ := store.Holds(group)
	return some
}

// at is the same peer seen from another edge.
func (p *peer) at(store *Store) *peer {
	return &peer{t: p.t, server: p.server, client: p.client, store: store}
}

func TestColdEdgeResumes(t *testing.T) {
	for name, version := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			first := newPeer(t, Config{})
			first.server.MaxVersion = version
			first.want("g|1", 0, noSession)
			first.want("g|2", 0, noSession)
			first.want("h|1", 0, noSession)
			if !holds(first.store, "g") || holds(first.store, "x") {
				t.Error("Holds")
			}
			from := first
			for range 4 { // each gets it from the one before
				next := first.at(New(Config{}))
				dealt := deal(from.store, "g", 1, true)
				if len(dealt) != 2 || dealt["g|1"] == nil {
					t.Fatalf("dealt %v", dealt)
				}
				for identity, containers := range dealt {
					if err := next.store.Adopt(identity, "e", containers[0], first.client); err != nil {
						t.Fatal(err)
					}
				}
				for _, identity := range []exchange.Identity{"g|1", "g|2"} {
					if r := next.dial(identity); r.mechanism == 0 || !r.resumed {
						t.Fatalf("%s: %+v", identity, r)
					}
				}
				next.want("h|1", 0, noSession)
				from = next
			}
			first.want("g|1", map[uint16]resealv1.Mechanism{tls.VersionTLS12: ticket, tls.VersionTLS13: psk}[version], 0)
		})
	}
}

func TestColdEdgeResumesBySessionID(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	first, second := New(Config{}), New(Config{})
	if _, _, err := visit(t, first, address, "a", cfg); err != nil {
		t.Fatal(err)
	}
	if err := second.Adopt("a", "e1", deal(first, "a", 1, true)["a"][0], cfg); err != nil {
		t.Fatal(err)
	}
	second = restart(t, second, false)
	for _, store := range []*Store{second, first, second} {
		if mechanism, miss, err := visit(t, store, address, "a", cfg); err != nil || mechanism != sessionID {
			t.Fatalf("%v, %v, %v", mechanism, miss, err)
		}
	}
}

// Each ticket of a server that takes them once goes to one edge, and is not used
// by the one that gave it.
func TestSingleUseTicketsAreDealtOut(t *testing.T) {
	p := newPeer(t, Config{})
	for range 4 {
		p.supplyTicket("a")
	}
	p.store.mu.Lock()
	p.store.find("a").learn(reuseOnce, time.Now())
	for _, h := range p.store.find("a").sessions {
		h.filed = h.filed.Add(-time.Minute)
	}
	p.store.mu.Unlock()
	round := deal(p.store, "a", 8, false)["a"]
	given := slices.DeleteFunc(slices.Clone(round), func(data []byte) bool { return data == nil })
	if len(given) != 3 || len(p.store.find("a").sessions) != 1 {
		t.Fatalf("%d given, %d left; one should stay", len(given), len(p.store.find("a").sessions))
	}
	seeds := deal(p.store, "a", 2, true)["a"]
	if len(seeds) != 2 || seeds[0] == nil || seeds[1] != nil || holds(p.store, "a") {
		t.Fatalf("seeds %d, holds %t", len(seeds), holds(p.store, "a"))
	}
	tickets := map[string]bool{}
	for _, data := range append(given, seeds[0]) {
		entries, _, err := parseContainer(data, maxOffer)
		if err != nil || len(entries) != 1 || entries[0].used || entries[0].knowledge.reuse != reuseOnce {
			t.Fatalf("%+v, %v", entries, err)
		}
		tickets[string(entries[0].ticket)] = true
	}
	if len(tickets) != 4 {
		t.Errorf("%d different tickets", len(tickets))
	}
	other := p.at(New(Config{}))
	if err := other.store.Adopt("a", "e1", given[0], p.client); err != nil {
		t.Fatal(err)
	}
	if other.store.find("a").reuse != reuseOnce {
		t.Error("the knowledge did not travel")
	}
	other.want("a", psk, 0)
}

// An edge that has nothing gets as many idle tickets as it asks for; from one
// that uses all of its own, one, while others remain.
func TestStockOfBusyEdge(t *testing.T) {
	p := newPeer(t, Config{})
	for range 4 {
		p.supplyTicket("a")
	}
	r := p.store.find("a")
	p.store.mu.Lock()
	r.learn(reuseOnce, time.Now())
	for _, h := range r.sessions[:3] {
		h.filed = h.filed.Add(-time.Minute)
	}
	p.store.mu.Unlock()
	if some, spare, stock := p.store.Holds("a"); !some || !spare || !stock {
		t.Error("Holds", some, spare, stock)
	}
	given := func(most int) int {
		n := 0
		for _, containers := range p.store.Deal("a", 1, most) {
			entries, _, err := parseContainer(containers[0], maxOffer)
			if err != nil {
				t.Fatal(err)
			}
			n += len(entries)
		}
		return n
	}
	if n := given(2); n != 2 {
		t.Errorf("%d given, want 2", n)
	}
	if n := given(8); n != 1 || len(r.sessions) != 1 {
		t.Errorf("%d given, %d left, want 1 each", n, len(r.sessions))
	}
	if n := given(8); n != 0 {
		t.Error("the ticket without which there is no other was given away in use")
	}
	p.store.mu.Lock()
	r.pending = 1
	p.store.mu.Unlock()
	if n := given(8); n != 1 {
		t.Errorf("%d given beside another in use, want 1", n)
	}
}

// supplyTicket makes a full handshake whose ticket is kept beside the others.
func (p *peer) supplyTicket(identity exchange.Identity) {
	p.t.Helper()
	donor := p.at(New(Config{}))
	donor.want(identity, 0, noSession)
	if _, err := p.store.Import(donor.store.Export(time.Now(), true), time.Now()); err != nil {
		p.t.Fatal(err)
	}
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	g, r := p.store.use(identity)
	r.lastDeal = time.Time{}
	g.freshen(r, r.sessions[0], true)
}

// While it is not known that a server takes each ticket once, the copies of a
// ticket that others hold teach it when they are declined.
func TestDeclinedCopyTeachesSingleUse(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.SetSessionTicketKeys([][32]byte{{1}})
	p.want("a", 0, noSession)
	round := deal(p.store, "a", 2, false)["a"]
	other := p.at(New(Config{}))
	if err := other.store.Adopt("a", "e1", round[1], p.client); err != nil {
		t.Fatal(err)
	}
	p.server.SetSessionTicketKeys([][32]byte{{2}}) // spent, as far as one can see
	for _, edge := range []*peer{p, other} {
		edge.want("a", 0, declined)
		if edge.store.find("a").reuse != reuseOnce {
			t.Error("not learnt")
		}
	}
}

func TestDealOnlyWhatIsNew(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a", 0, noSession)
	if n := len(deal(p.store, "a", 0, false)); n != 0 {
		t.Errorf("%d dealt to nobody", n)
	}
	for i, want := range []int{1, 0} {
		if n := len(deal(p.store, "a", 3, false)); n != want {
			t.Errorf("round %d: %d", i, n)
		}
	}
	p.want("a", ticket, 0)
	if n := len(deal(p.store, "a", 3, false)); n != 0 {
		t.Errorf("%d dealt after a resumption", n)
	}
	record := p.store.find("a")
	record.lastDeal = time.Now().Add(-dealAgain - time.Second)
	p.want("a", ticket, 0)
	if n := len(deal(p.store, "a", 3, false)); n != 1 {
		t.Errorf("%d dealt when the last one got old", n)
	}
	// A full handshake soon after the last round waits for its turn.
	p.server.SetSessionTicketKeys([][32]byte{{2}})
	p.want("a", 0, declined)
	for i, want := range []int{0, 1} {
		if n := len(deal(p.store, "a", 3, false)); n != want {
			t.Errorf("after a full handshake, %d: %d", i, n)
		}
		record.lastDeal = time.Now().Add(-dealGap - time.Second)
	}
	// What is in doubt is not dealt.
	p.store.Doubt("a")
	if n := len(deal(p.store, "a", 3, true)); n != 0 {
		t.Errorf("%d dealt in doubt", n)
	}
	p.want("a", ticket, 0)
	// Nor what is old.
	record.sessions[0].born = time.Now().Add(-maxSharedAge)
	if n := len(deal(p.store, "a", 3, true)); n != 0 || holds(p.store, "a") {
		t.Errorf("%d old ones dealt", n)
	}
	p.store.Forget("a")
	if n := len(deal(p.store, "a", 3, true)); n != 0 {
		t.Errorf("%d dealt of what was forgotten", n)
	}
}

// An edge whose session the server declined deals the new one, and it takes the
// place of the old ones everywhere.
func TestRenewedSessionReplaces(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		p := newPeer(t, Config{})
		p.server.MaxVersion = version
		p.server.SetSessionTicketKeys([][32]byte{{1}})
		p.want("a", 0, noSession)
		other := p.at(restart(t, p.store, true)) // as if it had made its own
		other.store.find("a").sessions[0].born = time.Now().Add(-time.Minute)
		p.server.SetSessionTicketKeys([][32]byte{{2}})
		p.want("a", 0, declined)
		p.store.find("a").lastDeal = time.Time{}
		if err := other.store.Adopt("a", "e1", deal(p.store, "a", 1, false)["a"][0], p.client); err != nil {
			t.Fatal(err)
		}
		if n := len(other.store.find("a").sessions); n != 1 {
			t.Errorf("%d sessions", n)
		}
		if r := other.dial("a"); r.mechanism == 0 {
			t.Errorf("%s: %+v", tls.VersionName(version), r)
		}
	}
}

// An adopted session, and what comes of it, ends an hour after the server gave
// it.
func TestAdoptedSessionsEnd(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		p := newPeer(t, Config{})
		p.server.MaxVersion = version
		p.want("a", 0, noSession)
		born := p.store.find("a").sessions[0].born.Add(-20 * time.Minute)
		p.store.find("a").sessions[0].born = born
		other := p.at(New(Config{}))
		if err := other.store.Adopt("a", "e1", deal(p.store, "a", 1, true)["a"][0], p.client); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			h := other.store.find("a").sessions[0]
			if !slices.Equal(h.path, []string{"e1"}) || h.useBy.After(born.Add(maxSharedAge)) || h.born.After(born) {
				t.Fatalf("path %v, use by %v, born %v", h.path, h.useBy, h.born)
			}
			if r := other.dial("a"); r.mechanism == 0 {
				t.Fatal(r)
			}
		}
		if n := len(deal(other.store, "a", 3, false)); n != 0 {
			t.Errorf("%d dealt that another edge deals", n)
		}
		other.store.Expel("e2")
		if len(other.store.find("a").sessions) == 0 {
			t.Error("expelled the wrong edge")
		}
		other.store.Expel("e1")
		other.want("a", 0, noSession)
		if other.store.find("a").sessions[0].path != nil {
			t.Error("a full handshake's session has a path")
		}
	}
}

func TestAdoptRefuses(t *testing.T) {
	p := newPeer(t, Config{})
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a", 0, noSession)
	good := deal(p.store, "a", 1, true)["a"][0]
	_, foreign := issue(t, time.Now().Add(time.Hour))
	change := func(edit func(*entry)) []byte {
		entries, _, err := parseContainer(good, maxOffer)
		if err != nil {
			t.Fatal(err)
		}
		edit(&entries[0])
		c := newContainer(maxOffer, false)
		c.add(entries[0])
		return c.data
	}
	many := newContainer(maxOffer, false)
	for range maxOfferItems + 1 {
		many.add(entry{identity: "a", ticket: []byte{1}, session: []byte{1}})
	}
	with := func(edit func(*tls.Config)) *tls.Config {
		cfg := p.client.Clone()
		edit(cfg)
		return cfg
	}
	for name, test := range map[string]struct {
		data []byte
		cfg  *tls.Config
	}{
		"other roots":     {good, with(func(c *tls.Config) { c.RootCAs = foreign })},
		"other name":      {good, with(func(c *tls.Config) { c.ServerName = "other.test" })},
		"no name":         {good, with(func(c *tls.Config) { c.ServerName = "" })},
		"version":         {good, with(func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 })},
		"switched off":    {good, with(func(c *tls.Config) { c.SessionTicketsDisabled = true })},
		"pool's own rule": {good, with(func(c *tls.Config) { c.VerifyConnection = func(tls.ConnectionState) error { return errors.New("no") } })},
		"peer rule": {good, with(func(c *tls.Config) {
			c.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { return errors.New("no") }
		})},
		"too old":        {change(func(e *entry) { e.born = e.born.Add(-maxSharedAge) }), p.client},
		"of the future":  {change(func(e *entry) { e.born = e.born.Add(maxSkew + time.Minute) }), p.client},
		"no age":         {change(func(e *entry) { e.born = time.Time{} }), p.client},
		"expired":        {change(func(e *entry) { e.useBy = time.Now().Add(-time.Second) }), p.client},
		"other identity": {change(func(e *entry) { e.identity = "b" }), p.client},
		"long way":       {change(func(e *entry) { e.path = strings.Split(strings.Repeat("x", maxPath), "") }), p.client},
		"no session":     {change(func(e *entry) { e.session = nil }), p.client},
		"too many":       {many.data, p.client},
		"nonsense":       {[]byte("nonsense"), p.client},
		"another leaf":   {change(func(e *entry) { e.session = p.forge(e.session) }), p.client},
	} {
		store := New(Config{})
		if err := store.Adopt("a", "e1", test.data, test.cfg); err == nil || holds(store, "a") {
			t.Errorf("%s: %v, holds %t", name, err, holds(store, "a"))
		}
	}
	if err := New(Config{}).Adopt("a", "e1", good, p.client); err != nil {
		t.Fatal(err)
	}
}

// forge is a session whose leaf the roots know nothing of, with verified chains
// that end in a root that they know. crypto/tls looks at the root only.
func (p *peer) forge(encoded []byte) []byte {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "forged"}, DNSNames: []string{"example.test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		p.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	state := tls.ConnectionState{
		Version: tls.VersionTLS12, CipherSuite: tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, CurveID: tls.X25519,
		PeerCertificates: []*x509.Certificate{leaf},
		VerifiedChains:   [][]*x509.Certificate{{leaf, p.server.Certificates[0].Leaf}},
	}
	forged, err := encodeSession(state, bytes.Repeat([]byte{1}, 48), true, time.Now())
	if err != nil {
		p.t.Fatal(err)
	}
	return forged
}

// Adopted sessions never push out what the edge has of its own.
func TestAdoptIsBounded(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("a|0", 0, noSession)
	store := New(Config{MaxIdentities: 4})
	own := p.at(store)
	own.want("a|own", 0, noSession)
	refused := 0
	for _, identity := range []exchange.Identity{"a|1", "a|2", "a|3"} {
		p.want(identity, 0, noSession)
	}
	for identity, containers := range p.store.Deal("a", 1, maxOfferItems) {
		if err := store.Adopt(identity, "e1", containers[0], p.client); errors.Is(err, ErrFull) {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if refused != 3 || store.find("a|own") == nil {
		t.Errorf("%d refused", refused)
	}
	store = New(Config{MaxSessions: 8})
	for range 12 {
		donor := p.at(New(Config{}))
		donor.want("a", 0, noSession)
		if err := store.Adopt("a", "e1", deal(donor.store, "a", 1, true)["a"][0], p.client); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(store.find("a").sessions); n != maxAdopted {
		t.Errorf("%d adopted sessions of an identity", n)
	}
}

func FuzzAdopt(f *testing.F) {
	p := newPeer(f, Config{})
	p.want("a", 0, noSession)
	f.Add(deal(p.store, "a", 1, true)["a"][0])
	f.Fuzz(func(t *testing.T, data []byte) {
		store := New(Config{})
		err := store.Adopt("a", "e1", data, p.client)
		for _, r := range store.copyAll(time.Now()) {
			for _, h := range r.sessions {
				if r.identity != "a" || len(h.path) == 0 || h.useBy.After(time.Now().Add(maxSharedAge+maxSkew)) {
					t.Fatalf("%s %+v, %v", r.identity, h, err)
				}
			}
		}
	})
}
