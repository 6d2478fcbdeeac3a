// Package feed receives an edge's configuration from the control plane, has it
// applied and keeps the last good one for the next start.
package feed

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// retryInterval is how often a refused configuration is tried again: what was
	// wrong may lie with this machine, such as a port in use or a missing file.
	retryInterval = 10 * time.Second
	// maxViolations is what the contract allows in a Nack.
	maxViolations = 100
)

// State keeps files over restarts. *state.Dir is one.
type State interface {
	// Read returns what was written last. An error that is fs.ErrNotExist means that
	// nothing has been written yet.
	Read(name string) ([]byte, error)
	// Write replaces the content of a file, all or nothing.
	Write(name string, data []byte) error
	// Note is Write without waiting for the disk: it outlasts the process, but
	// maybe not the machine.
	Note(name string, data []byte) error
}

// Candidate is a configuration that should be in force.
type Candidate struct {
	// Snapshot holds what can be used. It is immutable.
	Snapshot *resealv1.Snapshot
	// Unusable are resources of the revision that this edge does not understand.
	// They are not in Snapshot, and are refused by these violations.
	Unusable []*resealv1.Violation
}

// Outcome is what came of a Candidate.
type Outcome struct {
	// Violations say why not all of it is in force. Empty: all is.
	Violations []*resealv1.Violation
	// HeldBack are the resources that are not in force as the candidate has them.
	HeldBack []*resealv1.ResourceRef
	// InForce are the resources that are served now if only a part of the candidate
	// is. Nil, with violations: nothing of it is, and what was in force stays.
	InForce []*resealv1.Resource
}

// Config is what a feed needs. It is read once, by New.
type Config struct {
	// Edge is the edge's id, as in its certificate. Required.
	Edge string
	// BootID is random per start of the process. Required.
	BootID string
	// Version is shown to operators.
	Version string
	// Labels are matched by selectors.
	Labels map[string]string
	// StartedAt is when the process started. Zero: when New was called.
	StartedAt time.Time
	// Client calls the control plane; link.Dial's takes messages that are large
	// enough. Required.
	Client resealv1.FeedServiceClient
	// State keeps the last good configuration. Required.
	State State
	// Apply puts as much of a candidate in force as this edge can serve and says
	// what it can't. Calls don't overlap. It should return soon after ctx ends, and
	// within a minute, or the control plane ends the stream. Required.
	Apply func(ctx context.Context, candidate Candidate) Outcome
	// Unchanged is called in place of Apply when the snapshot in force gets a
	// new revision and nothing else. Nil: Apply is called.
	Unchanged func(revision int64)
	// Running is what is really in force, nil before anything is: the same object
	// until that changes. Its hash is told with every answer, and when it changes
	// without one. Nil: the hash is not told.
	Running func() *resealv1.Snapshot
	// Drain stops taking new clients, or takes clients again. A timeout of 0
	// stands for each listener's own. It must not block. Nil: orders to drain
	// are ignored.
	Drain func(drain bool, timeout time.Duration)
	// Move connects to another replica of the control plane, rather to one of those
	// addresses. It must not block. It returns false when the edge knows no other.
	// Nil: the edge stays.
	Move func(addresses []string) bool
	// Probe probes an endpoint of a pool that is in force and reports, or refuses
	// by a report with an error. Calls don't overlap. It returns soon after ctx
	// ends, which is before the control plane stops waiting. Nil, as well as a
	// nil report: every order is refused.
	Probe func(ctx context.Context, order *resealv1.ProbeOrder) *resealv1.ProbeReport
	// Preview tells what a candidate would do, and does nothing. It is called beside
	// Apply, once at a time, and must not return nil. Nil: the edge can't preview.
	Preview func(ctx context.Context, candidate Candidate) *resealv1.EdgeImpact
	// Previews calls the control plane for candidates to preview. Required with
	// Preview.
	Previews resealv1.PreviewServiceClient
	// Failures reports the failures that are remembered. It must not block. Nil:
	// there are none.
	Failures func(order *resealv1.FailuresOrder) *resealv1.FailuresReport
	// Observe has requests seen as an order says, until ctx ends or the control plane ends
	// it, and returns why. It is called beside all else. Nil: nobody can.
	Observe func(ctx context.Context, order *resealv1.ObserveOrder) error
	// Shares takes how many connections to each endpoint pools may have of their
	// connections.maxPerFleet, by the pool's name, in place of what it was told before.
	// It returns at once. Nil: they are ignored.
	Shares func(shares map[string]int)
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
}

// Feed is an edge's side of the FeedService.
type Feed struct {
	config Config
	synced chan struct{}
	writer *writer

	// applying has room for one: it serialises Apply, and is filled before mu is
	// taken. It is not a mutex, so that time goes on in synctest while one waits.
	applying chan struct{}

	// again asks for the held configuration to be applied once more.
	again chan struct{}
	trial *trial // belongs to whoever holds applying

	drained atomic.Bool                // the control plane said so last
	stays   sync.Once                  // it was said that the edge knows no other replica
	shares  *resealv1.ConnectionShares // that Config.Shares was told last; belongs to the session

	// What survives a reconnect, guarded by mu.
	mu       sync.Mutex
	held     *holding // what the next delta counts from, nil: nothing
	inForce  *holding // nil: nothing yet; not what is held while that is refused
	served   int64    // the newest revision that was in force as a whole, 0: none
	refusal  *resealv1.Nack
	distrust bool               // what is held does not fit what the server sends
	session  *session           // nil: no stream
	told     *resealv1.Snapshot // what Running returned when its hash was told last
}

// New makes a feed that does nothing before Run.
func New(config Config) *Feed {
	if config.StartedAt.IsZero() {
		config.StartedAt = time.Now()
	}
	tried := newTrial(config)
	return &Feed{
		config:   config,
		synced:   make(chan struct{}),
		writer:   newWriter(config, tried),
		applying: make(chan struct{}, 1),
		again:    make(chan struct{}, 1),
		trial:    tried,
	}
}

// Run follows the control plane until ctx ends, over as many streams as that
// takes. An unreachable control plane is not an error. It returns nil when the last
// good configuration is written.
func (f *Feed) Run(ctx context.Context) error {
	f.recall()
	var writing errgroup.Group
	ended := make(chan struct{})
	writing.Go(func() error { return f.writer.run(ended) })

	following, followCtx := errgroup.WithContext(ctx)
	following.Go(func() error { return f.connect(followCtx) })
	following.Go(func() error { return f.retry(followCtx) })
	following.Go(func() error { return f.prove(followCtx) })
	err := following.Wait()
	f.endTrial()
	close(ended)
	return errors.Join(err, writing.Wait())
}

// Synced is closed when the first configuration from the control plane is in
// force, or a part of it.
func (f *Feed) Synced() <-chan struct{} { return f.synced }

// Connected tells whether the control plane has accepted the stream, and the
// stream lives.
func (f *Feed) Connected() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.session != nil && f.session.accepted
}

// Revision is the newest revision that was in force as a whole, 0 for none.
func (f *Feed) Revision() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.served
}

// take makes the configuration that update leads to the held one. It is not yet
// in force.
func (f *Feed) take(update *resealv1.Update) (*holding, error) {
	f.mu.Lock()
	held := f.held
	f.mu.Unlock()
	next, err := held.with(update)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.distrust = true
		return nil, err
	}
	f.held, f.distrust = next, false
	return next, nil
}

// apply puts the held configuration in force and returns what to tell the
// server.
func (f *Feed) apply(ctx context.Context, held *holding) *resealv1.SyncRequest {
	f.applying <- struct{}{}
	defer func() { <-f.applying }()
	f.trial.sent(held.hash)
	answer := f.applyLocked(ctx, held)
	if answer.GetAck() != nil || answer.GetNack().GetPartly() {
		select {
		case <-f.synced:
		default:
			close(f.synced)
		}
	}
	return answer
}

func (f *Feed) applyLocked(ctx context.Context, held *holding) *resealv1.SyncRequest {
	f.mu.Lock()
	same := f.inForce != nil && bytes.Equal(f.inForce.hash, held.hash) && f.refusal == nil
	f.mu.Unlock()
	if same && f.config.Unchanged != nil && f.runs(held) {
		f.config.Unchanged(held.revision)
		return f.serveWhole(held)
	}
	return f.carryOut(ctx, held)
}

// carryOut applies a configuration unless it is known to end the process.
func (f *Feed) carryOut(ctx context.Context, held *holding) *resealv1.SyncRequest {
	if violations := f.condemned(held); len(violations) > 0 {
		f.fallBack(ctx)
		return f.refuse(held, Outcome{Violations: violations})
	}
	f.trial.begin(held)
	return f.answer(held, f.config.Apply(ctx, Candidate{Snapshot: held.snapshot(), Unusable: held.problems()}))
}

// answer notes what came of held.
func (f *Feed) answer(held *holding, outcome Outcome) *resealv1.SyncRequest {
	if len(outcome.Violations) == 0 {
		return f.serveWhole(held)
	}
	if outcome.InForce != nil {
		f.servePart(held, outcome)
	}
	return f.refuse(held, outcome)
}

// serveWhole notes that all of held is in force.
func (f *Feed) serveWhole(held *holding) *resealv1.SyncRequest {
	f.mu.Lock()
	f.inForce, f.served, f.refusal = held, held.revision, nil
	f.mu.Unlock()
	f.keep(held)
	return f.ack(held)
}

// servePart notes what is in force when a part of held is refused.
func (f *Feed) servePart(held *holding, outcome Outcome) {
	f.mu.Lock()
	part, err := held.part(outcome.InForce, f.inForce)
	if err == nil {
		part.revision = f.served
		f.inForce = part
	}
	f.mu.Unlock()
	if err != nil {
		f.config.Logger.Error("what is in force can't be kept for the next start", "error", err)
		return
	}
	f.trial.add(part)
	f.keep(part)
}

func (f *Feed) refuse(held *holding, outcome Outcome) *resealv1.SyncRequest {
	violations, heldBack := outcome.Violations, outcome.HeldBack
	nack := &resealv1.Nack{
		Revision:        held.revision,
		Violations:      violations[:min(len(violations), maxViolations)],
		ServingRevision: f.Revision(),
		Partly:          outcome.InForce != nil,
		HeldBack:        heldBack[:min(len(heldBack), maxViolations)],
		RunningHash:     f.running(held),
	}
	f.mu.Lock()
	before := f.refusal
	f.refusal = nack
	f.mu.Unlock()
	if !proto.Equal(before, nack) {
		message := "configuration is refused, what was in force stays"
		if nack.Partly {
			message = "a part of the configuration is refused and stays as it was; the rest is in force"
		}
		f.config.Logger.Error(message, "revision", nack.GetRevision(), "serving", nack.GetServingRevision(),
			"held_back", refNames(heldBack), "error", &resealv1.ViolationsError{Violations: violations})
	}
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Nack{Nack: nack}}
}

func refNames(refs []*resealv1.ResourceRef) []string {
	names := make([]string, len(refs))
	for i, ref := range refs {
		names[i] = ref.Key()
	}
	return names
}

// Again has the held configuration applied once more, soon, for example because a
// file that it names has changed. The control plane hears when that changes the
// answer.
func (f *Feed) Again() {
	select {
	case f.again <- struct{}{}:
	default:
	}
}

// retry tries a refused configuration again and again, with or without a stream.
func (f *Feed) retry(ctx context.Context) error {
	ticker := time.NewTicker(retryInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			f.retryOnce(ctx, false)
		case <-f.again:
			f.retryOnce(ctx, true)
		}
	}
}

// retryOnce applies what is held, if it is refused or always is set.
func (f *Feed) retryOnce(ctx context.Context, always bool) {
	f.applying <- struct{}{}
	defer func() { <-f.applying }()
	f.mu.Lock()
	held, before := f.held, f.refusal
	f.mu.Unlock()
	if held == nil || before == nil && !always {
		f.tellRunning(held)
		return
	}
	answer := f.carryOut(ctx, held)
	if proto.Equal(answer.GetNack(), before) {
		return
	}
	if answer.GetAck() != nil {
		f.config.Logger.Info("configuration that was refused is now in force", "revision", held.revision)
	}
	f.tellLate(held, answer)
}

// tellLate sends an answer to an update that has been answered already.
func (f *Feed) tellLate(held *holding, answer *resealv1.SyncRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.session != nil && f.held == held {
		f.session.answerLate(answer)
	}
}
