package keyring

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	secretSize = 32
	// maxEpochs bounds what an edge holds, over all keyrings. A keyring that
	// rotates every minute and retires after a week has 10,080.
	maxEpochs = 1 << 17
)

// errMalformed is the error for keys that break the contract.
var errMalformed = errors.New("malformed keys")

// ring is a keyring as it was said last. Holder.mu guards it.
type ring struct {
	name         string
	retireAfter  time.Duration
	maxActiveAge time.Duration
	epochs       map[uint64]*epoch
	active       *epoch // nil: nothing encrypts
	newest       uint64 // the highest number that was named, even when it is erased
	stale        bool   // as it was logged last
}

// epoch is one generation of a ring's secret.
type epoch struct {
	number      uint64
	state       resealv1.EpochState
	preparedAt  time.Time
	activatedAt time.Time
	retiredAt   time.Time
	eraseAt     time.Time
	secret      [secretSize]byte
}

// newRings checks keyrings and copies them. Times that are absent are now.
func newRings(keyrings []*resealv1.KeyringSecrets, now time.Time) (map[string]*ring, error) {
	rings, total := map[string]*ring{}, 0
	for _, keyring := range keyrings {
		total += len(keyring.GetEpochs())
		next, err := newRing(keyring, now)
		switch {
		case total > maxEpochs:
			err = fmt.Errorf("more than %d epochs", maxEpochs)
		case err == nil && rings[next.name] != nil:
			err = errors.New("it is there twice")
		}
		if err != nil {
			for _, dropped := range rings {
				dropped.erase()
			}
			return nil, fmt.Errorf("%w: keyring %q: %w", errMalformed, keyring.GetName(), err)
		}
		rings[next.name] = next
	}
	return rings, nil
}

func newRing(keyring *resealv1.KeyringSecrets, now time.Time) (*ring, error) {
	defaults := (*resealv1.Keyring)(nil).WithDefaults()
	r := &ring{
		name:         keyring.GetName(),
		retireAfter:  cmp.Or(keyring.GetRetireAfter().AsDuration(), defaults.RetireAfter.AsDuration()),
		maxActiveAge: cmp.Or(keyring.GetMaxActiveAge().AsDuration(), defaults.MaxActiveAge.AsDuration()),
		epochs:       map[uint64]*epoch{},
	}
	if r.name == "" {
		return nil, errors.New("it has no name")
	}
	if r.retireAfter < 0 || r.maxActiveAge < 0 {
		return nil, errors.New("a duration is negative")
	}
	for _, secret := range keyring.GetEpochs() {
		if err := r.add(secret, now); err != nil {
			r.erase()
			return nil, fmt.Errorf("epoch %d: %w", secret.GetEpoch().GetNumber(), err)
		}
	}
	return r, nil
}

func (r *ring) add(from *resealv1.EpochSecret, now time.Time) error {
	said := from.GetEpoch()
	e := &epoch{
		number:      said.GetNumber(),
		state:       said.GetState(),
		preparedAt:  timeOr(said.GetPreparedAt(), now),
		activatedAt: timeOr(said.GetActivatedAt(), time.Time{}),
		retiredAt:   timeOr(said.GetRetiredAt(), time.Time{}),
		eraseAt:     timeOr(said.GetEraseAt(), time.Time{}),
	}
	switch {
	case e.number == 0:
		return errors.New("epochs are numbered from 1")
	case r.epochs[e.number] != nil:
		return errors.New("it is there twice")
	case !plausible(from.GetSecret()):
		return fmt.Errorf("the secret is not %d random bytes", secretSize)
	}
	switch e.state {
	case resealv1.EpochState_EPOCH_STATE_PREPARED:
	case resealv1.EpochState_EPOCH_STATE_ACTIVE:
		if r.active != nil {
			return fmt.Errorf("epoch %d is active, too", r.active.number)
		}
		e.activatedAt = cmp.Or(e.activatedAt, now)
		r.active = e
	case resealv1.EpochState_EPOCH_STATE_RETIRED:
		e.retiredAt = cmp.Or(e.retiredAt, now)
	default:
		return fmt.Errorf("state %d is not known here", e.state)
	}
	copy(e.secret[:], from.GetSecret())
	r.epochs[e.number] = e
	r.newest = max(r.newest, e.number)
	return nil
}

// plausible refuses what can't have come from a random generator: a secret of
// another size, or one byte again and again, as memory that was never filled.
func plausible(secret []byte) bool {
	return len(secret) == secretSize &&
		slices.ContainsFunc(secret, func(b byte) bool { return b != secret[0] })
}

func timeOr(t *timestamppb.Timestamp, absent time.Time) time.Time {
	if t == nil {
		return absent
	}
	return t.AsTime()
}

// follow copies what r must remember of the ring that it replaces.
func (r *ring) follow(old *ring) {
	r.stale = old.stale
	if len(r.epochs) == 0 {
		r.newest = old.newest
	}
}

// issuing tells whether the ring's active epoch may encrypt at now: it must not
// have become older than maxActiveAge without a newer one.
func (r *ring) issuing(now time.Time) bool {
	return r.active != nil && now.Before(r.staleAt())
}

// staleAt is when the active epoch, which must be there, stops encrypting unless
// a newer one comes.
func (r *ring) staleAt() time.Time { return r.active.activatedAt.Add(r.maxActiveAge) }

// due is when an epoch ends by this edge's own count. One that was not retired
// ends retireAfter after the last moment at which it may have encrypted.
func (r *ring) due(e *epoch) time.Time {
	switch {
	case e.state == resealv1.EpochState_EPOCH_STATE_RETIRED && !e.eraseAt.IsZero():
		return e.eraseAt
	case e.state == resealv1.EpochState_EPOCH_STATE_RETIRED:
		return e.retiredAt.Add(r.retireAfter)
	case e == r.active:
		return r.staleAt().Add(r.retireAfter)
	default:
		return e.preparedAt.Add(r.maxActiveAge + r.retireAfter)
	}
}

// remove erases an epoch.
func (r *ring) remove(e *epoch) {
	clear(e.secret[:])
	delete(r.epochs, e.number)
	if r.active == e {
		r.active = nil
	}
}

// erase overwrites all secrets. The ring is of no use afterwards.
func (r *ring) erase() {
	for _, e := range r.epochs {
		clear(e.secret[:])
	}
}

// numbers are those of the epochs, sorted.
func (r *ring) numbers() []uint64 { return slices.Sorted(maps.Keys(r.epochs)) }

// activeNumber is 0 when there is no active epoch.
func (r *ring) activeNumber() uint64 {
	if r.active == nil {
		return 0
	}
	return r.active.number
}

// message is the ring as a message, which then holds copies of the secrets.
func (r *ring) message() *resealv1.KeyringSecrets {
	m := &resealv1.KeyringSecrets{
		Name:         r.name,
		RetireAfter:  durationpb.New(r.retireAfter),
		MaxActiveAge: durationpb.New(r.maxActiveAge),
	}
	for _, number := range r.numbers() {
		e := r.epochs[number]
		m.Epochs = append(m.Epochs, &resealv1.EpochSecret{
			Epoch: &resealv1.Epoch{
				Number:      e.number,
				State:       e.state,
				PreparedAt:  timestampOf(e.preparedAt),
				ActivatedAt: timestampOf(e.activatedAt),
				RetiredAt:   timestampOf(e.retiredAt),
				EraseAt:     timestampOf(e.eraseAt),
			},
			Secret: slices.Clone(e.secret[:]),
		})
	}
	return m
}

func timestampOf(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// wipe overwrites the secrets in messages.
func wipe(keyrings []*resealv1.KeyringSecrets) {
	for _, keyring := range keyrings {
		for _, e := range keyring.GetEpochs() {
			clear(e.GetSecret())
		}
	}
}

// sorted are the rings by name. h.mu is held.
func (h *Holder) sorted() []*ring {
	return slices.SortedFunc(maps.Values(h.rings), func(a, b *ring) int { return cmp.Compare(a.name, b.name) })
}
