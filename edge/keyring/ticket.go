package keyring

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// A ticket is
//
//	epoch   8 bytes, the epoch's number, big-endian
//	random 24 bytes
//	check   8 bytes
//	sealed    AES-256-GCM with a random nonce of 12 bytes before it
//
// Its context is the policy's id, what stands before sealed, and the SNI. The key is
// what HKDF-Expand (RFC 5869 section 2.3) makes of the epoch's secret, with the
// context as info. So each ticket has a key of its own, of which one nonce is used,
// and opens under no other policy, name or epoch. The additional data is the
// context from the epoch on.
//
// The check is the beginning of a plain SHA-256 of the context without the epoch
// and itself: it protects nothing, but tells a ticket of another policy or name
// from a damaged one, and spares the work for it.
const (
	epochSize  = 8
	randomSize = 24
	checkSize  = 8
	headerSize = epochSize + randomSize + checkSize
	keySize    = 32
	// overhead is how much longer a ticket is than what it holds.
	overhead = headerSize + 12 + 16

	ticketLabel = "reseal ticket 3\x00"
	policyLabel = "reseal ticket policy 1\x00"
	// headerAt is where the ticket's header stands in its context.
	headerAt = len(ticketLabel) + sha256.Size
)

// Policy is what the tickets of one listener under one policy are sealed with.
// It is safe for concurrent use, and follows the keys that the Holder gets.
type Policy struct {
	holder  *Holder
	keyring string
	id      [sha256.Size]byte
}

// Keys returns the tickets' keys for a listener under a policy, of a keyring
// ("" is "default"). policyKey must cover all that a ticket may depend on: the
// policy's uid, the mode of client authentication and the set of client CAs.
// Equal arguments mean the same keys on every edge. It is not an error if the
// keyring is not held (yet): no tickets are issued and none opens.
func (h *Holder) Keys(keyring, listener, policyKey string) *Policy {
	if keyring == "" {
		keyring = resealv1.DefaultKeyring
	}
	named := []byte(policyLabel)
	for _, value := range []string{keyring, listener, policyKey} {
		named = binary.AppendUvarint(named, uint64(len(value)))
		named = append(named, value...)
	}
	return &Policy{holder: h, keyring: keyring, id: sha256.Sum256(named)}
}

// Issuing reports whether Wrap makes tickets now. It does not without an active
// epoch, nor when that has become older than the keyring's maxActiveAge.
func (p *Policy) Issuing() bool {
	p.holder.mu.RLock()
	defer p.holder.mu.RUnlock()
	ring := p.holder.rings[p.keyring]
	return ring != nil && ring.issuing(time.Now())
}

// Wrap seals a session's state for a client that named sni. It reports false
// when no tickets are issued, see Issuing.
func (p *Policy) Wrap(state []byte, sni string) (ticket []byte, ok bool) {
	number, secret, ok := p.active()
	if !ok {
		return nil, false
	}
	defer clear(secret[:])
	var header [headerSize]byte
	binary.BigEndian.PutUint64(header[:], number)
	_, _ = rand.Read(header[epochSize:][:randomSize]) // never fails (crypto/rand)
	context := p.context(header[:], sni)
	opener := newOpener(&secret, context)
	if opener == nil {
		return nil, false
	}
	ticket = append(make([]byte, 0, len(state)+overhead), context[headerAt:][:headerSize]...)
	return opener.Seal(ticket, nil, state, context[headerAt:]), true
}

// Ours reports whether a ticket names an epoch that is held, so that Unwrap is likely
// to open it. It is quick, and looks at nothing else.
func (p *Policy) Ours(ticket []byte) bool {
	if len(ticket) < overhead {
		return false
	}
	p.holder.mu.RLock()
	defer p.holder.mu.RUnlock()
	ring := p.holder.rings[p.keyring]
	return ring != nil && ring.epochs[binary.BigEndian.Uint64(ticket)] != nil
}

// Unwrap opens a ticket that a client presents with sni. When it can't, state is
// nil and miss says why: KEY_UNKNOWN or KEY_RETIRED when there is no such epoch
// (yet, or any more), STALE_KEYRING when it is not known because no newer key has
// come for too long, POLICY_MISMATCH when it was sealed for another policy,
// listener or name, and UNDECRYPTABLE when it is damaged, or sealed under another
// secret of that number.
//
// The epoch is the one that the ticket names, even when it can't be opened. It is
// 0 for a number that no epoch of the keyring can have by now, as a damaged or
// foreign ticket has.
func (p *Policy) Unwrap(ticket []byte, sni string) (state []byte, epoch uint64, miss resealv1.MissReason) {
	if len(ticket) < overhead {
		return nil, 0, resealv1.MissReason_MISS_REASON_UNDECRYPTABLE
	}
	secret, epoch, miss := p.find(binary.BigEndian.Uint64(ticket))
	defer clear(secret[:])
	if miss == resealv1.MissReason_MISS_REASON_UNSPECIFIED {
		state, miss = p.open(&secret, ticket, sni)
	}
	return state, epoch, miss
}

// open opens a ticket with the secret of its epoch.
func (p *Policy) open(secret *[secretSize]byte, ticket []byte, sni string) (state []byte, miss resealv1.MissReason) {
	header, sealed := ticket[:headerSize], ticket[headerSize:]
	context := p.context(header, sni)
	if !bytes.Equal(context[headerAt:][:headerSize], header) {
		return nil, resealv1.MissReason_MISS_REASON_POLICY_MISMATCH
	}
	opener := newOpener(secret, context)
	if opener == nil {
		return nil, resealv1.MissReason_MISS_REASON_UNDECRYPTABLE
	}
	state, err := opener.Open(nil, nil, sealed, context[headerAt:])
	if err != nil {
		return nil, resealv1.MissReason_MISS_REASON_UNDECRYPTABLE
	}
	return state, resealv1.MissReason_MISS_REASON_UNSPECIFIED
}

// aheadOfNewest is how far beyond the newest epoch that it knows an edge believes
// the number in a ticket: as many rotations as it may have missed.
const aheadOfNewest = 16

// active copies the secret that encrypts now.
func (p *Policy) active() (number uint64, secret [secretSize]byte, ok bool) {
	p.holder.mu.RLock()
	defer p.holder.mu.RUnlock()
	ring := p.holder.rings[p.keyring]
	if ring == nil || !ring.issuing(time.Now()) {
		return 0, secret, false
	}
	return ring.active.number, ring.active.secret, true
}

// find copies the secret of the epoch that a ticket names.
func (p *Policy) find(named uint64) (secret [secretSize]byte, number uint64, miss resealv1.MissReason) {
	now := time.Now()
	p.holder.mu.RLock()
	defer p.holder.mu.RUnlock()
	ring := p.holder.rings[p.keyring]
	if ring == nil {
		return secret, 0, resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
	}
	if named <= ring.newest+aheadOfNewest {
		number = named
	}
	e := ring.epochs[named]
	switch {
	case e != nil && !p.holder.ended(ring, e, now):
		return e.secret, number, resealv1.MissReason_MISS_REASON_UNSPECIFIED
	case e != nil || named != 0 && named <= ring.newest:
		return secret, number, resealv1.MissReason_MISS_REASON_KEY_RETIRED
	case !ring.issuing(now):
		return secret, number, resealv1.MissReason_MISS_REASON_STALE_KEYRING
	default:
		return secret, number, resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
	}
}

// context is all that a ticket is bound to: that of a header, with the right check
// whatever the header says.
func (p *Policy) context(header []byte, sni string) []byte {
	context := append(make([]byte, 0, headerAt+headerSize+len(sni)), ticketLabel...)
	context = append(context, p.id[:]...)
	context = append(append(context, make([]byte, headerSize)...), sni...)
	own := context[headerAt:][:headerSize]
	copy(own[epochSize:], header[epochSize:][:randomSize])
	check := sha256.Sum256(context)
	copy(own, header[:epochSize])
	copy(own[epochSize+randomSize:], check[:checkSize])
	return context
}

// newOpener makes a ticket's cipher. It is nil when the standard library refuses
// the parameters, which it does not for these sizes.
func newOpener(secret *[secretSize]byte, context []byte) cipher.AEAD {
	key := expand(secret, context)
	defer clear(key[:])
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil
	}
	// Of the two GCMs in the standard library, this one is allowed by FIPS 140.
	opener, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil
	}
	return opener
}

// expand is HKDF-Expand (RFC 5869 section 2.3) for the 32 bytes of one block of
// HMAC-SHA256 (RFC 2104). hkdf.Expand takes three times as long for it, and ten
// allocations: without those, a resumed handshake costs the edge what it costs
// with the keys of crypto/tls.
func expand(secret *[secretSize]byte, info []byte) [keySize]byte {
	// An SNI is a host name (RFC 6066 section 3), so this is room enough.
	var room [sha256.BlockSize + 512]byte
	inner := append(append(padded(room[:0], secret, 0x36), info...), 1)
	sum := sha256.Sum256(inner)
	outer := append(padded(room[:0], secret, 0x5c), sum[:]...)
	defer clear(room[:])
	defer clear(inner) // should it have outgrown room
	return sha256.Sum256(outer)
}

// padded appends the block with which a hash of HMAC begins.
func padded(b []byte, secret *[secretSize]byte, pad byte) []byte {
	for _, s := range secret {
		b = append(b, s^pad)
	}
	for range sha256.BlockSize - secretSize {
		b = append(b, pad)
	}
	return b
}
