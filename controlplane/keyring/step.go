package keyring

import (
	"slices"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// MaxEpochs bounds the epochs of a keyring. While it has that many, no epoch is
	// prepared: a keyring whose retireAfter is more than MaxEpochs times
	// rotationInterval rotates as fast as its epochs are erased.
	MaxEpochs = 2048
	// maxWait bounds how long an edge can delay the fleet.
	maxWait = 5 * time.Minute
	// maxSkew is how far the clocks of two replicas may differ. A time that lies
	// further ahead can't be right.
	maxSkew = time.Minute
)

// Epoch is an epoch without its secret.
type Epoch struct {
	// Number grows by one with each epoch of the keyring, from 1.
	Number uint64 `json:"number"`
	// State is PREPARED, ACTIVE or RETIRED.
	State resealv1.EpochState `json:"state"`
	// PreparedAt is when it was made.
	PreparedAt time.Time `json:"preparedAt"`
	// ActivatedAt is when it began to encrypt. Zero before.
	ActivatedAt time.Time `json:"activatedAt,omitzero"`
	// RetiredAt is when it stopped encrypting. Zero before.
	RetiredAt time.Time `json:"retiredAt,omitzero"`
	// Settled says that no live edge encrypts with the retired epoch any more,
	// or that the wait for that is over: RetiredAt is final.
	Settled bool `json:"settled,omitempty"`
}

// Ring is the epochs of a keyring. It is a value: nothing changes it in place.
type Ring struct {
	// Last is the number of the newest epoch that there ever was.
	Last uint64 `json:"last"`
	// Epochs are sorted by number.
	Epochs []Epoch `json:"epochs,omitempty"`
}

// Held is what a live edge has acked of a keyring.
type Held struct {
	// Edge is its id.
	Edge string
	// Unknown says that the edge has acked nothing since it connected.
	Unknown bool
	// Has says whether the edge decrypts with an epoch.
	Has func(number uint64) bool
	// Active is the epoch that the edge encrypts with. 0: none.
	Active uint64
}

// Fleet is the live edges that a keyring selects.
type Fleet struct {
	// Edges are sorted by id.
	Edges []Held
	// Since is when the fleet began to be watched without a gap. Deadlines don't
	// begin before that: nobody could ack.
	Since time.Time
	// Complete says that the fleet has been watched for so long that an edge that is
	// not among Edges is not alive.
	Complete bool
	// Behind says that a replica does not know the ring yet, so that edges that are
	// not among Edges yet may have been told of less.
	Behind bool
}

// Verb is a step of an epoch's life.
type Verb string

const (
	// Prepare makes the next epoch. Edges decrypt with it.
	Prepare Verb = "prepare"
	// Activate lets edges encrypt with a prepared epoch.
	Activate Verb = "activate"
	// Retire ends that for the active epoch. It always comes with Activate.
	Retire Verb = "retire"
	// Settle makes the time at which an epoch stopped encrypting final.
	Settle Verb = "settle"
	// Erase ends an epoch.
	Erase Verb = "erase"
	// Restamp replaces times that lie ahead of the clock. After a clock went
	// back, a rotation or an erasure would otherwise wait for years.
	Restamp Verb = "restamp"
)

// Action is one step of one epoch.
type Action struct {
	Verb  Verb
	Epoch uint64
	// Due says that time is the reason, whatever edges have acked.
	Due bool
}

// Step says what is to be done now, in this order. It is pure: the same
// arguments give the same actions, and when those are done (Ring.Do) it gives
// none. After an outage of any length it gives what is due now, not what was
// missed: one new epoch, not many.
//
// The next epoch is prepared rotationInterval after the active one became
// active. It becomes active when every edge has acked it, or at its Deadline;
// where nothing encrypts yet, even while the fleet is not Complete. It waits for
// replicas that are Behind as for edges. A retired
// epoch is erased retireAfter after it stopped encrypting, which is when no edge
// encrypts with it, but at most the same wait after it was retired.
func Step(now time.Time, spec *resealv1.Keyring, ring Ring, fleet Fleet) []Action {
	s := &stepper{now: now, spec: spec, ring: ring, fleet: fleet}
	s.restamp()
	s.erase()
	s.prepare()
	s.activate()
	s.settle()
	s.erase()
	return s.actions
}

type stepper struct {
	now     time.Time
	spec    *resealv1.Keyring
	ring    Ring
	fleet   Fleet
	actions []Action
}

func (s *stepper) do(actions ...Action) {
	s.actions = append(s.actions, actions...)
	s.ring = s.ring.Do(s.now, actions)
}

func (s *stepper) restamp() {
	limit := s.now.Add(maxSkew)
	for _, e := range s.ring.Epochs {
		if e.PreparedAt.After(limit) || e.ActivatedAt.After(limit) || e.RetiredAt.After(limit) {
			s.do(Action{Verb: Restamp, Epoch: e.Number, Due: true})
		}
	}
}

func (s *stepper) erase() {
	for _, e := range s.ring.Epochs {
		if e.State == resealv1.EpochState_EPOCH_STATE_RETIRED && e.Settled && !s.now.Before(e.EraseAt(s.spec)) {
			s.do(Action{Verb: Erase, Epoch: e.Number, Due: true})
		}
	}
}

func (s *stepper) prepare() {
	if _, ok := s.ring.Prepared(); ok || len(s.ring.Epochs) >= MaxEpochs {
		return
	}
	active, ok := s.ring.Active()
	if !ok || !s.now.Before(NextRotation(s.spec, active)) {
		s.do(Action{Verb: Prepare, Epoch: s.ring.Last + 1, Due: true})
	}
}

func (s *stepper) activate() {
	prepared, ok := s.ring.Prepared()
	if !ok {
		return
	}
	active, replaces := s.ring.Active()
	acked := !slices.ContainsFunc(s.fleet.Edges, func(h Held) bool { return !h.Has(prepared.Number) })
	due := !s.now.Before(Deadline(s.spec, prepared.PreparedAt, s.fleet))
	if !due && (!acked || s.fleet.Behind || replaces && !s.fleet.Complete) {
		return
	}
	due = due && !acked
	if replaces {
		s.do(Action{Verb: Retire, Epoch: active.Number, Due: due})
	}
	s.do(Action{Verb: Activate, Epoch: prepared.Number, Due: due})
}

func (s *stepper) settle() {
	for _, e := range s.ring.Epochs {
		if e.State != resealv1.EpochState_EPOCH_STATE_RETIRED || e.Settled {
			continue
		}
		encrypts := slices.ContainsFunc(s.fleet.Edges, func(h Held) bool { return h.Unknown || h.Active == e.Number })
		due := !s.now.Before(Deadline(s.spec, e.RetiredAt, s.fleet))
		if due || s.fleet.Complete && !s.fleet.Behind && !encrypts {
			s.do(Action{Verb: Settle, Epoch: e.Number, Due: due})
		}
	}
}

// Deadline is when the fleet stops waiting for acks of what was done at a given
// time: after half of rotationInterval, at most 5 minutes. So it is at least 30
// seconds with any manifest that passes validation.
func Deadline(spec *resealv1.Keyring, done time.Time, fleet Fleet) time.Time {
	if done.Before(fleet.Since) {
		done = fleet.Since
	}
	return done.Add(min(spec.GetRotationInterval().AsDuration()/2, maxWait))
}

// NextRotation is when the epoch that follows the active one is prepared.
func NextRotation(spec *resealv1.Keyring, active Epoch) time.Time {
	return active.ActivatedAt.Add(spec.GetRotationInterval().AsDuration())
}

// EraseAt is when a retired epoch is erased.
func (e Epoch) EraseAt(spec *resealv1.Keyring) time.Time {
	return e.RetiredAt.Add(spec.GetRetireAfter().AsDuration())
}

// Laggards are the edges that have not acked the newest epoch.
func Laggards(ring Ring, fleet Fleet) []string {
	if len(ring.Epochs) == 0 {
		return nil
	}
	newest := ring.Epochs[len(ring.Epochs)-1].Number
	var ids []string
	for _, held := range fleet.Edges {
		if !held.Has(newest) {
			ids = append(ids, held.Edge)
		}
	}
	return ids
}

// Active is the epoch that edges encrypt with.
func (r Ring) Active() (Epoch, bool) { return r.first(resealv1.EpochState_EPOCH_STATE_ACTIVE) }

// Prepared is the epoch that becomes active next.
func (r Ring) Prepared() (Epoch, bool) { return r.first(resealv1.EpochState_EPOCH_STATE_PREPARED) }

func (r Ring) first(state resealv1.EpochState) (Epoch, bool) {
	i := slices.IndexFunc(r.Epochs, func(e Epoch) bool { return e.State == state })
	if i < 0 {
		return Epoch{}, false
	}
	return r.Epochs[i], true
}

// Find returns an epoch by its number.
func (r Ring) Find(number uint64) (Epoch, bool) {
	i, ok := slices.BinarySearchFunc(r.Epochs, number, func(e Epoch, number uint64) int {
		switch {
		case e.Number < number:
			return -1
		case e.Number > number:
			return 1
		}
		return 0
	})
	if !ok {
		return Epoch{}, false
	}
	return r.Epochs[i], true
}

// Do returns the ring after actions that are done now.
func (r Ring) Do(now time.Time, actions []Action) Ring {
	next := Ring{Last: r.Last, Epochs: slices.Clone(r.Epochs)}
	for _, action := range actions {
		if action.Verb == Prepare {
			next.Last++
			next.Epochs = append(next.Epochs, Epoch{Number: next.Last, State: resealv1.EpochState_EPOCH_STATE_PREPARED, PreparedAt: now})
			continue
		}
		i := slices.IndexFunc(next.Epochs, func(e Epoch) bool { return e.Number == action.Epoch })
		switch {
		case i < 0:
		case action.Verb == Erase:
			next.Epochs = slices.Delete(next.Epochs, i, i+1)
		default:
			next.Epochs[i] = next.Epochs[i].after(action.Verb, now)
		}
	}
	return next
}

func (e Epoch) after(verb Verb, now time.Time) Epoch {
	switch verb {
	case Activate:
		e.State, e.ActivatedAt = resealv1.EpochState_EPOCH_STATE_ACTIVE, later(now, e.PreparedAt)
	case Retire:
		e.State, e.RetiredAt = resealv1.EpochState_EPOCH_STATE_RETIRED, later(now, e.ActivatedAt)
	case Settle:
		e.Settled, e.RetiredAt = true, later(now, e.RetiredAt)
	case Restamp:
		for _, stamp := range []*time.Time{&e.PreparedAt, &e.ActivatedAt, &e.RetiredAt} {
			if stamp.After(now) {
				*stamp = now
			}
		}
	}
	return e
}

// later keeps an epoch's times in order when a clock went back.
func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// Rotate says what an operator's wish for a new epoch leads to: nothing while a
// rotation is under way or the ring is full.
func Rotate(ring Ring) []Action {
	if _, ok := ring.Prepared(); ok || len(ring.Epochs) >= MaxEpochs {
		return nil
	}
	return []Action{{Verb: Prepare, Epoch: ring.Last + 1, Due: true}}
}

// Revoke says what the revocation of epochs leads to. Where the active one is
// among them the prepared one, or a new one, becomes active at once.
func Revoke(ring Ring, numbers []uint64) []Action {
	var actions []Action
	_, active := ring.Active()
	prepared, hasPrepared := ring.Prepared()
	for _, number := range numbers {
		e, ok := ring.Find(number)
		if !ok {
			continue
		}
		actions = append(actions, Action{Verb: Erase, Epoch: number, Due: true})
		active = active && e.State != resealv1.EpochState_EPOCH_STATE_ACTIVE
		hasPrepared = hasPrepared && number != prepared.Number
	}
	_, wasActive := ring.Active()
	if active || !wasActive {
		return actions
	}
	next := prepared.Number
	if !hasPrepared {
		next = ring.Last + 1
		actions = append(actions, Action{Verb: Prepare, Epoch: next, Due: true})
	}
	return append(actions, Action{Verb: Activate, Epoch: next, Due: true})
}

// TicketAge is the age of the oldest ticket that an epoch may have encrypted, 0
// when it encrypted none.
func TicketAge(now time.Time, e Epoch) time.Duration {
	if e.ActivatedAt.IsZero() {
		return 0
	}
	return max(now.Sub(e.ActivatedAt), 0)
}
