package share

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"iter"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority issues certificates of edges.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	roots       *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key := newKey(t, elliptic.P256())
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a := &authority{certificate: template, key: key}
	a.certificate = a.sign(t, template, key)
	a.roots = x509.NewCertPool()
	a.roots.AddCert(a.certificate)
	return a
}

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) sign(t testing.TB, template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// edge is the identity of an edge, after edit.
func (a *authority) edge(t testing.TB, id string, edits ...func(*x509.Certificate)) credentials {
	t.Helper()
	return a.issue(t, id, newKey(t, elliptic.P256()), edits...)
}

func (a *authority) issue(t testing.TB, id string, key *ecdsa.PrivateKey, edits ...func(*x509.Certificate)) credentials {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "reseal", Path: "/edge/" + id}},
	}
	for _, edit := range edits {
		edit(template)
	}
	return credentials{a.sign(t, template, key), key, a.roots}
}

// box is a Sessions that remembers what was adopted, and which groups were asked
// for something to give.
type box struct {
	adopted []string
	fresh   string // group
	dealt   []string
}

func (b *box) Watch() (<-chan struct{}, func())       { return nil, func() {} }
func (b *box) Fresh(group string) bool                { return group == b.fresh }
func (b *box) Holds(string) (some, spare, stock bool) { return false, false, false }
func (b *box) Expel(string)                           {}
func (b *box) Deal(group string, _, _ int) iter.Seq2[exchange.Identity, [][]byte] {
	b.dealt = append(b.dealt, group)
	return func(func(exchange.Identity, [][]byte) bool) {}
}

func (b *box) Adopt(identity exchange.Identity, sender string, data []byte, cfg *tls.Config) error {
	if cfg.ServerName != "example.test" {
		return errors.New("no such name")
	}
	b.adopted = append(b.adopted, sender+" "+string(identity)+" "+string(data))
	return nil
}

// receiver is edge e2, which shares the pool "p".
func receiver(t testing.TB) (*Share, *box) {
	b := &box{}
	s := New(Config{Edge: "e2", BootID: "boot", Sessions: b})
	s.Update([]Pool{{Name: "p", Group: "g", TLS: func(identity exchange.Identity) *tls.Config {
		if identity == "g|nowhere" {
			return nil
		}
		return &tls.Config{ServerName: "example.test"}
	}}})
	return s, b
}

func TestAccept(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	origin, own := ca.edge(t, "e1"), ca.edge(t, "e2")
	keys := []credentials{own, ca.edge(t, "e2")} // a renewal ago
	offer := func(from credentials, to *ecdsa.PublicKey, edits ...func(*resealv1.SessionOffer)) *resealv1.SessionOffer {
		o := &resealv1.SessionOffer{Origin: "e1", Recipient: "e2", RecipientBootId: "boot", Pool: "p", Identity: "g|a"}
		for _, edit := range edits {
			edit(o)
		}
		if err := seal(o, []byte("session"), to, from.certificate, from.key); err != nil {
			t.Fatal(err)
		}
		return o
	}
	public := &own.key.PublicKey
	at := func(when time.Duration) *resealv1.SessionOffer {
		o := offer(origin, public)
		o.Time = timestamppb.New(time.Now().Add(when))
		resign(t, o, origin.key)
		return o
	}
	unsigned := offer(origin, public)
	unsigned.Signature = nil
	thief := ca.edge(t, "e3")
	stolen := offer(origin, public) // what e1 sealed, signed by e3 as its own
	stolen.Origin, stolen.Certificate = "e3", thief.certificate.Raw
	resign(t, stolen, thief.key)
	for name, o := range map[string]*resealv1.SessionOffer{
		"another recipient":    offer(origin, public, func(o *resealv1.SessionOffer) { o.Recipient = "e3" }),
		"an earlier start":     offer(origin, public, func(o *resealv1.SessionOffer) { o.RecipientBootId = "before" }),
		"from itself":          offer(own, public, func(o *resealv1.SessionOffer) { o.Origin = "e2" }),
		"foreign pool":         offer(origin, public, func(o *resealv1.SessionOffer) { o.Pool = "q" }),
		"changed pool":         offer(origin, public, func(o *resealv1.SessionOffer) { o.Identity = "h|a" }),
		"unknown identity":     offer(origin, public, func(o *resealv1.SessionOffer) { o.Identity = "g|nowhere" }),
		"too old":              at(-maxSkew - time.Second),
		"of the future":        at(maxSkew + time.Second),
		"without time":         offer(origin, public),
		"unsigned":             unsigned,
		"sealed to another":    offer(origin, &ca.edge(t, "e3").key.PublicKey),
		"another's signature":  offer(credentials{origin.certificate, own.key, ca.roots}, public),
		"another's name":       offer(ca.edge(t, "e3"), public),
		"foreign authority":    offer(foreign.edge(t, "e1"), public),
		"expired":              offer(ca.edge(t, "e1", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), public),
		"operator":             offer(ca.edge(t, "e1", func(c *x509.Certificate) { c.URIs[0].Path = "/operator/e1" }), public),
		"another trust domain": offer(ca.edge(t, "e1", func(c *x509.Certificate) { c.URIs[0].Host = "other" }), public),
		"two names":            offer(ca.edge(t, "e1", func(c *x509.Certificate) { c.DNSNames = []string{"x"} }), public),
		"not a client":         offer(ca.edge(t, "e1", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), public),
		"other curve":          offer(ca.issue(t, "e1", newKey(t, elliptic.P384())), public),
		"signed by a thief":    stolen,
		"huge certificate":     offer(credentials{&x509.Certificate{Raw: bytes.Repeat([]byte{1}, maxCertificate+1)}, origin.key, nil}, public),
		"no certificate":       offer(credentials{&x509.Certificate{}, origin.key, nil}, public),
	} {
		if name == "without time" {
			o.Time = nil
		}
		s, b := receiver(t)
		if err := s.accept(o, keys); err == nil || len(b.adopted) > 0 {
			t.Errorf("%s: %v, %v", name, err, b.adopted)
		}
	}
	s, b := receiver(t)
	good := offer(origin, public)
	if err := s.accept(good, keys); err != nil || len(b.adopted) != 1 || b.adopted[0] != "e1 g|a session" {
		t.Fatalf("%v, %v", err, b.adopted)
	}
	if err := s.accept(good, keys); err == nil || len(b.adopted) != 1 {
		t.Errorf("replayed: %v", err)
	}
	if err := s.accept(offer(origin, &keys[1].key.PublicKey), keys); err != nil {
		t.Errorf("sealed before the renewal: %v", err)
	}
}

func resign(t testing.TB, offer *resealv1.SessionOffer, key *ecdsa.PrivateKey) {
	t.Helper()
	var err error
	if offer.Signature, err = ecdsa.SignASN1(rand.Reader, key, digest(offer)); err != nil {
		t.Fatal(err)
	}
}

// Whatever changes in an offer, it is refused.
func TestTamperedOffersAreRefused(t *testing.T) {
	ca := newAuthority(t)
	origin, own := ca.edge(t, "e1"), ca.edge(t, "e2")
	good := &resealv1.SessionOffer{Origin: "e1", Recipient: "e2", RecipientBootId: "boot", Pool: "p", Identity: "g|a"}
	if err := seal(good, []byte("session"), &own.key.PublicKey, origin.certificate, origin.key); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(r *rapid.T) {
		s, b := receiver(t)
		offer := proto.CloneOf(good)
		text := rapid.StringN(0, 20, 40).Draw(r, "text")
		flip := func(data []byte) []byte {
			i := rapid.IntRange(0, len(data)-1).Draw(r, "at")
			data[i] ^= byte(rapid.IntRange(1, 255).Draw(r, "by"))
			return data
		}
		switch rapid.IntRange(0, 8).Draw(r, "field") {
		case 0:
			offer.Origin = text
		case 1:
			offer.Recipient = text
		case 2:
			offer.RecipientBootId = text
		case 3:
			offer.Pool = text
		case 4:
			offer.Identity = "g|b" + text
		case 5:
			offer.Time = timestamppb.New(good.Time.AsTime().Add(time.Duration(rapid.IntRange(1, 200_000).Draw(r, "later")) * time.Millisecond))
		case 6:
			offer.Ciphertext = flip(offer.Ciphertext)
		case 7:
			offer.Signature = flip(offer.Signature)
		case 8:
			offer.Certificate = flip(offer.Certificate)
		}
		if err := s.accept(offer, []credentials{own}); err == nil || len(b.adopted) > 0 {
			r.Fatalf("taken: %v", offer)
		}
	})
}

// Both parts of a header that differ in any way differ as bytes.
func TestHeaderIsUnambiguous(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(label string) *resealv1.SessionOffer {
			f := rapid.SliceOfN(rapid.StringOfN(rapid.SampledFrom([]rune("ab\x00")), 0, 3, -1), 5, 5).Draw(t, label)
			return &resealv1.SessionOffer{Origin: f[0], Recipient: f[1], RecipientBootId: f[2], Pool: f[3], Identity: f[4]}
		}
		a, b := draw("a"), draw("b")
		if bytes.Equal(header(a), header(b)) != proto.Equal(a, b) {
			t.Fatal("two offers with one header")
		}
	})
}

func FuzzAccept(f *testing.F) {
	ca := newAuthority(f)
	origin, own := ca.edge(f, "e1"), ca.edge(f, "e2")
	good := &resealv1.SessionOffer{Origin: "e1", Recipient: "e2", RecipientBootId: "boot", Pool: "p", Identity: "g|a"}
	if err := seal(good, []byte("session"), &own.key.PublicKey, origin.certificate, origin.key); err != nil {
		f.Fatal(err)
	}
	wire, err := proto.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Fuzz(func(t *testing.T, data []byte) {
		offer := &resealv1.SessionOffer{}
		if proto.Unmarshal(data, offer) != nil {
			return
		}
		s, b := receiver(t)
		if err := s.accept(offer, []credentials{own}); err == nil && strings.Join(b.adopted, "") != "e1 g|a session" {
			t.Fatalf("%v", b.adopted)
		}
	})
}

// Pools that have nothing new cost nothing when an edge looks for new ones,
// several times a second.
func TestOnlyPoolsWithNewSessionsAreDealt(t *testing.T) {
	sessions := &box{fresh: "g7"}
	s := New(Config{Edge: "e1", BootID: "b1", Sessions: sessions})
	var pools []Pool
	for i := range 100 {
		pools = append(pools, Pool{Name: fmt.Sprintf("p%d", i), Group: fmt.Sprintf("g%d", i)})
	}
	s.Update(pools)
	x := &meeting{share: s, holding: &resealv1.ExchangeHolding{}, again: time.NewTimer(time.Hour)}
	defer x.again.Stop()
	for range 3 {
		if err := x.offerNew(time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(sessions.dealt, []string{"g7", "g7", "g7"}) {
		t.Errorf("dealt %v", sessions.dealt)
	}
}
