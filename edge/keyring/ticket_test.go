package keyring

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"testing"
	"time"

	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func mustWrap(t testing.TB, p *Policy, state, sni string) []byte {
	t.Helper()
	ticket, ok := p.Wrap([]byte(state), sni)
	if !ok || len(ticket) != len(state)+overhead {
		t.Fatalf("Wrap: %d bytes, %v", len(ticket), ok)
	}
	return ticket
}

func expect(t testing.TB, p *Policy, ticket []byte, sni, state string, miss resealv1.MissReason) {
	t.Helper()
	got, _, reason := p.Unwrap(ticket, sni)
	if string(got) != state || reason != miss || (miss != good) != (got == nil) {
		t.Errorf("Unwrap: %q %v, want %q %v", got, reason, state, miss)
	}
}

func TestTickets(t *testing.T) {
	r, other := newRotation("default"), newRotation("other")
	now := time.Now()
	h := holding(t,
		r.keyring(r.epoch(3, retired, now), r.epoch(5, active, now), r.epoch(6, prepared, now)),
		other.keyring(other.epoch(5, active, now)))
	p := h.Keys("", "main", "policy")
	ticket := mustWrap(t, p, "state", "app.test")
	expect(t, p, ticket, "app.test", "state", good)
	expect(t, h.Keys("default", "main", "policy"), ticket, "app.test", "state", good)

	// What a ticket may not be taken for.
	expect(t, p, ticket, "other.test", "", mismatch)
	expect(t, p, ticket, "", "", mismatch)
	expect(t, h.Keys("", "mainp", "olicy"), ticket, "app.test", "", mismatch)
	expect(t, h.Keys("", "other", "policy"), ticket, "app.test", "", mismatch)
	expect(t, h.Keys("", "main", "changed"), ticket, "app.test", "", mismatch)
	expect(t, h.Keys("other", "main", "policy"), ticket, "app.test", "", mismatch)
	expect(t, h.Keys("none", "main", "policy"), ticket, "app.test", "", keyUnknown)

	// Other epochs.
	with := func(number byte) []byte { return append([]byte{0, 0, 0, 0, 0, 0, 0, number}, ticket[8:]...) }
	expect(t, p, with(4), "app.test", "", keyRetired)
	expect(t, p, with(2), "app.test", "", keyRetired)
	expect(t, p, with(7), "app.test", "", keyUnknown)
	expect(t, p, with(0), "app.test", "", keyUnknown)
	expect(t, p, with(3), "app.test", "", damaged)

	// Damage.
	for i := range ticket {
		changed := bytes.Clone(ticket)
		changed[i] ^= 1
		want := damaged
		switch {
		case i == 7: // epoch 4
			want = keyRetired
		case i < 8:
			want = keyUnknown
		case i < headerSize:
			want = mismatch
		}
		expect(t, p, changed, "app.test", "", want)
	}
	expect(t, p, ticket[:len(ticket)-1], "app.test", "", damaged)
	expect(t, p, ticket[:headerSize], "app.test", "", damaged)
	expect(t, p, nil, "app.test", "", damaged)
	expect(t, p, append(bytes.Clone(ticket), 0), "app.test", "", damaged)

	// What other edges issued or still issue opens, too.
	for number, state := range map[uint64]resealv1.EpochState{3: retired, 6: prepared} {
		elsewhere := holding(t, r.keyring(r.epoch(number, active, now)))
		expect(t, p, mustWrap(t, elsewhere.Keys("", "main", "policy"), "x", ""), "", "x", good)
		if e := h.rings["default"].epochs[number]; e.state != state {
			t.Errorf("epoch %d is %v", number, e.state)
		}
	}
}

func TestNothingIsIssuedWithoutActiveEpoch(t *testing.T) {
	r := newRotation("default")
	for name, h := range map[string]*Holder{
		"nothing held":  holding(t),
		"empty keyring": holding(t, r.keyring()),
		"prepared":      holding(t, r.keyring(r.epoch(1, prepared, time.Now()))),
		"retired":       holding(t, r.keyring(r.epoch(1, retired, time.Now()))),
		"stale":         holding(t, r.keyring(r.epoch(1, active, time.Now().Add(-24*time.Hour)))),
	} {
		p := h.Keys("default", "main", "policy")
		if ticket, ok := p.Wrap([]byte("state"), ""); ok || ticket != nil || p.Issuing() {
			t.Errorf("%s: %x %v", name, ticket, ok)
		}
	}
}

// TestCVE_2020_13777: GnuTLS sealed tickets with a key of zeros until the first
// rotation. Whoever recorded the traffic could read it.
func TestCVE_2020_13777(t *testing.T) {
	const tickets = 10_000
	zero := make([]byte, secretSize)
	for name, secret := range map[string][]byte{
		"zeros": zero, "ones": bytes.Repeat([]byte{0xff}, secretSize), "short": zero[:16], "none": nil, "long": append([]byte{1}, zero...),
	} {
		r := newRotation("default")
		e := r.epoch(1, active, time.Now())
		e.Secret = bytes.Clone(secret)
		h := New(Config{})
		if err := h.apply(&resealv1.HoldResponse{Keyrings: []*resealv1.KeyringSecrets{r.keyring(e)}}, true); err == nil {
			t.Errorf("a secret of %s is taken", name)
		}
	}

	// Keys are erased while tickets are issued.
	r := newRotation("default")
	now := time.Now()
	h := holding(t, r.keyring(r.epoch(1, active, now)))
	p := h.Keys("", "main", "policy")
	state := "a state of fifty bytes, of which each must be sealed"
	issued := make(chan []byte, tickets)
	go func() {
		defer close(issued)
		for range tickets {
			ticket, ok := p.Wrap([]byte(state), "app.test")
			if !ok {
				t.Error("no ticket")
			}
			issued <- ticket
		}
	}()
	const rotations = 100
	for number := uint64(2); number < 2+rotations; number++ {
		if err := h.apply(&resealv1.HoldResponse{Keyrings: []*resealv1.KeyringSecrets{r.keyring(r.epoch(number, active, now))}}, true); err != nil {
			t.Fatal(err)
		}
	}
	var all [][]byte
	randoms, nonces := map[string]bool{}, map[string]bool{}
	for ticket := range issued {
		all = append(all, ticket)
		randoms[string(ticket[8:8+randomSize])] = true
		nonces[string(ticket[headerSize:headerSize+12])] = true
		if bytes.Contains(ticket, []byte("state")) {
			t.Fatal("a state stands in the clear")
		}
	}
	if len(all) != tickets || len(randoms) != tickets || len(nonces) != tickets {
		t.Errorf("%d tickets with %d randoms and %d nonces", len(all), len(randoms), len(nonces))
	}

	// The scan knows all but the secret. It must find the state with the right
	// one, otherwise it proves nothing.
	for _, ticket := range all[:10] {
		number := uint64(ticket[7])
		if !opens(t, ticket, p, r.secrets[number], "app.test") {
			t.Fatal("the scan opens nothing with the right key either")
		}
	}
	constants := [][]byte{zero, p.id[:]}
	for _, b := range []byte{1, 0x55, 0xaa, 0xff} {
		constants = append(constants, bytes.Repeat([]byte{b}, secretSize))
	}
	for i, ticket := range all {
		if opens(t, ticket, p, constants[i%len(constants)], "app.test") || opens(t, ticket, p, zero, "app.test") {
			t.Fatalf("ticket %d opens with a constant", i)
		}
	}
}

// opens tries a secret as an epoch's and as the key itself, without the package's
// own code.
func opens(t *testing.T, ticket []byte, p *Policy, secret []byte, sni string) bool {
	t.Helper()
	info := "reseal ticket 3\x00" + string(p.id[:]) + string(ticket[:40]) + sni
	derived, err := hkdf.Expand(sha256.New, secret, info, 32)
	if err != nil {
		t.Fatal(err)
	}
	aad := append(bytes.Clone(ticket[:40]), sni...)
	for _, key := range [][]byte{derived, secret} {
		block, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		gcm, err := cipher.NewGCM(block)
		if err != nil {
			t.Fatal(err)
		}
		for _, nonce := range [][]byte{ticket[40:52], make([]byte, 12)} {
			if _, err := gcm.Open(nil, nonce, ticket[52:], aad); err == nil {
				return true
			}
		}
	}
	return false
}

// expand is what the standard library makes of the same, whatever the size.
func TestExpand(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		secret := [secretSize]byte(rapid.SliceOfN(rapid.Byte(), secretSize, secretSize).Draw(t, "secret"))
		info := rapid.SliceOfN(rapid.Byte(), 0, 1000).Draw(t, "info")
		want, err := hkdf.Expand(sha256.New, secret[:], string(info), keySize)
		if err != nil {
			t.Fatal(err)
		}
		if got := expand(&secret, info); !bytes.Equal(got[:], want) {
			t.Fatalf("got %x, want %x", got, want)
		}
	})
}

func FuzzUnwrap(f *testing.F) {
	r := newRotation("default")
	h := holding(f, r.keyring(r.epoch(1, retired, time.Now()), r.epoch(2, active, time.Now())))
	p := h.Keys("", "main", "policy")
	ticket := mustWrap(f, p, "state", "app.test")
	f.Add([]byte{}, "app.test")
	f.Add(ticket, "app.test")
	f.Add(ticket, "")
	f.Add(ticket[:overhead], "app.test")
	f.Add(append([]byte{0, 0, 0, 0, 0, 0, 0, 1}, ticket[8:]...), "app.test")
	f.Fuzz(func(t *testing.T, data []byte, sni string) {
		state, _, miss := p.Unwrap(data, sni)
		whole := bytes.Equal(data, ticket) && sni == "app.test"
		if whole != (miss == good) || (state != nil) != whole {
			t.Errorf("%q %v", state, miss)
		}
		switch miss {
		case good, keyUnknown, keyRetired, damaged, mismatch:
		default:
			t.Errorf("reason %v", miss)
		}
		sealed, ok := p.Wrap(data, sni)
		if opened, _, miss := p.Unwrap(sealed, sni); !ok || miss != good || !bytes.Equal(opened, data) {
			t.Errorf("a ticket of %x does not open: %v", data, miss)
		}
	})
}

func BenchmarkTicket(b *testing.B) {
	r := newRotation("default")
	p := holding(b, r.keyring(r.epoch(1, active, time.Now()))).Keys("", "main", "policy")
	state := make([]byte, 120)
	ticket := mustWrap(b, p, string(state), "app.test")
	for name, f := range map[string]func(){
		"wrap":   func() { _, _ = p.Wrap(state, "app.test") },
		"unwrap": func() { _, _, _ = p.Unwrap(ticket, "app.test") },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f()
			}
		})
	}
}
