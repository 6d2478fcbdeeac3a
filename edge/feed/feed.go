// Package feed receives an edge's configuration from the control plane, has it
// applied and keeps the last good one for the next start.
package feed

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// MaxUpdate bounds an Update, in bytes.
	MaxUpdate = 64 << 20
	// retryInterval is how often a refused configuration is tried again: what
	// was wrong may be of this machine, as a port in use or a missing file.
	retryInterval = 10 * time.Second
	// maxViolations is what the contract allows in a Nack.
	maxViolations = 100
)

// State keeps files over restarts. *state.Dir is one.
type State interface {
	// Read returns what was written last. An error that is fs.ErrNotExist means
	// that nothing was written yet.
	Read(name string) ([]byte, error)
	// Write replaces the content of a file, all or nothing.
	Write(name string, data []byte) error
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
	// Client calls the control plane. Each stream takes messages of up to
	// MaxUpdate bytes. Required.
	Client resealv1.FeedServiceClient
	// State keeps the last good configuration. Required.
	State State
	// Apply puts a snapshot in force or says what is wrong with it and changes
	// nothing. Calls don't overlap. It should return soon after ctx ends, and
	// within a minute, else the control plane ends the stream. Required.
	Apply func(ctx context.Context, snapshot *resealv1.Snapshot) []*resealv1.Violation
	// Unchanged is called in place of Apply when the snapshot in force gets a
	// new revision and nothing else. Nil: Apply is called.
	Unchanged func(revision int64)
	// Serving returns the revision in force, for a refusal of another one.
	// Nil: the last one that Apply took.
	Serving func() int64
	// Drain stops taking new clients, or takes clients again. A timeout of 0
	// stands for each listener's own. It must not block. Nil: orders to drain
	// are ignored.
	Drain func(drain bool, timeout time.Duration)
	// Probe probes an endpoint of a pool that is in force and reports, or refuses
	// by a report with an error. Calls don't overlap. It returns soon after ctx
	// ends, which is before the control plane stops waiting. Nil, as well as a
	// nil report: every order is refused.
	Probe func(ctx context.Context, order *resealv1.ProbeOrder) *resealv1.ProbeReport
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
}

// Feed is an edge's side of the FeedService.
type Feed struct {
	config Config
	synced chan struct{}
	writer *writer

	// applying has room for one: it serialises Apply, and is filled before mu is
	// taken. It is no mutex, so that time goes on in synctest while one waits.
	applying chan struct{}

	// What survives a reconnect, guarded by mu.
	mu       sync.Mutex
	held     *holding // what the next delta counts from, nil: nothing
	applied  *holding // the last that Apply took, nil: none yet
	refusal  *resealv1.Nack
	distrust bool     // what is held does not fit what the server sends
	session  *session // nil: no stream
}

// New makes a feed that does nothing before Run.
func New(config Config) *Feed {
	if config.StartedAt.IsZero() {
		config.StartedAt = time.Now()
	}
	return &Feed{
		config:   config,
		synced:   make(chan struct{}),
		writer:   newWriter(config.State, config.Logger),
		applying: make(chan struct{}, 1),
	}
}

// Run follows the control plane until ctx ends, over as many streams as that
// takes. An unreachable control plane is no error. It returns nil when the last
// good configuration is written.
func (f *Feed) Run(ctx context.Context) error {
	if _, err := f.LoadLastGood(); err != nil && !errors.Is(err, errNone) {
		f.config.Logger.Error("the kept configuration can't be used, asking for all of it", "error", err)
	}
	var writing errgroup.Group
	ended := make(chan struct{})
	writing.Go(func() error { return f.writer.run(ended) })

	following, followCtx := errgroup.WithContext(ctx)
	following.Go(func() error { return f.connect(followCtx) })
	following.Go(func() error { return f.retry(followCtx) })
	err := following.Wait()
	close(ended)
	return errors.Join(err, writing.Wait())
}

// Synced is closed when the first configuration from the control plane is in
// force.
func (f *Feed) Synced() <-chan struct{} { return f.synced }

// Connected tells whether the control plane has accepted the stream, and the
// stream lives.
func (f *Feed) Connected() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.session != nil && f.session.accepted
}

// Revision is the newest revision that Apply took, 0 for none.
func (f *Feed) Revision() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.applied == nil {
		return 0
	}
	return f.applied.revision
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
	f.held, f.distrust, f.refusal = next, false, nil
	return next, nil
}

// apply puts the held configuration in force and returns what to tell the
// server.
func (f *Feed) apply(ctx context.Context, held *holding) *resealv1.SyncRequest {
	f.applying <- struct{}{}
	defer func() { <-f.applying }()
	return f.applyLocked(ctx, held)
}

func (f *Feed) applyLocked(ctx context.Context, held *holding) *resealv1.SyncRequest {
	f.mu.Lock()
	inForce := f.applied != nil && bytes.Equal(f.applied.hash, held.hash)
	f.mu.Unlock()
	violations := held.problems()
	switch {
	case len(violations) > 0:
	case inForce && f.config.Unchanged != nil:
		f.config.Unchanged(held.revision)
	default:
		violations = f.config.Apply(ctx, held.snapshot())
	}
	if len(violations) > 0 {
		return f.refuse(held, violations)
	}
	f.mu.Lock()
	f.applied, f.refusal = held, nil
	f.mu.Unlock()
	select {
	case <-f.synced:
	default:
		close(f.synced)
	}
	f.writer.write(held)
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Ack{Ack: &resealv1.Ack{Revision: held.revision}}}
}

func (f *Feed) refuse(held *holding, violations []*resealv1.Violation) *resealv1.SyncRequest {
	if len(violations) > maxViolations {
		violations = violations[:maxViolations]
	}
	nack := &resealv1.Nack{Revision: held.revision, Violations: violations}
	if f.config.Serving != nil {
		nack.ServingRevision = f.config.Serving()
	} else {
		nack.ServingRevision = f.Revision()
	}
	f.mu.Lock()
	before := f.refusal
	if f.held == held {
		f.refusal = nack
	}
	f.mu.Unlock()
	if !proto.Equal(before, nack) {
		f.config.Logger.Error("configuration is refused, the last good one stays in force", "revision", nack.GetRevision(),
			"serving", nack.GetServingRevision(), "error", &resealv1.ViolationsError{Violations: violations})
	}
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Nack{Nack: nack}}
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
			f.retryOnce(ctx)
		}
	}
}

func (f *Feed) retryOnce(ctx context.Context) {
	f.applying <- struct{}{}
	defer func() { <-f.applying }()
	f.mu.Lock()
	held, before := f.held, f.refusal
	f.mu.Unlock()
	if before == nil {
		return
	}
	answer := f.applyLocked(ctx, held)
	if proto.Equal(answer.GetNack(), before) {
		return
	}
	if answer.GetAck() != nil {
		f.config.Logger.Info("configuration that was refused is now in force", "revision", held.revision)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.session != nil && f.held == held {
		f.session.answerLate(answer)
	}
}
