package feed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// lastGoodName is what was in force last, or a part of it that was.
	lastGoodName = "last-good"
	// earlierName is what was in force before, and had proved itself: the one to
	// fall back to when the last ends the process.
	earlierName = "last-good-earlier"
	// rewriteInterval is the pause after a write that failed.
	rewriteInterval = 10 * time.Second
)

// ErrLastGood is the error of a kept configuration that is damaged.
var ErrLastGood = errors.New("the kept configuration is damaged")

// LoadLastGood reads the configuration that was in force last. The error is
// fs.ErrNotExist when none was kept, ErrLastGood when its content does not fit
// its hash or can't be decoded, and otherwise the State's. It is safe for concurrent use.
func (f *Feed) LoadLastGood() (*resealv1.Snapshot, error) {
	kept, err := f.load(lastGoodName)
	if err != nil {
		return nil, err
	}
	return kept.snapshot(), nil
}

func (f *Feed) load(name string) (*holding, error) {
	data, err := f.config.State.Read(name)
	if err != nil {
		return nil, fmt.Errorf("read the kept configuration: %w", err)
	}
	return unmarshalHolding(data)
}

// recall makes what was kept the held configuration, so that the control plane
// sends only what has changed.
func (f *Feed) recall() {
	kept, err := f.load(lastGoodName)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		f.config.Logger.Error("the kept configuration can't be used, asking for all of it", "error", err)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held == nil {
		f.held = kept
		f.writer.wrote(kept)
	}
}

// ApplyLastGood applies the configuration that was in force last, unless one is in
// force already. If that one ended the process time and again, the one before it
// is applied instead. Errors are those of LoadLastGood; a refused configuration
// is not an error, and is tried again.
func (f *Feed) ApplyLastGood(ctx context.Context) error {
	f.applying <- struct{}{}
	defer func() { <-f.applying }()
	if f.serving() {
		return nil
	}
	kept, err := f.load(lastGoodName)
	if err == nil && f.trial.condemns(kept.hash) {
		kept = f.earlier(kept)
	}
	if err != nil {
		return errors.Join(err, f.applyCondemned(ctx))
	}
	f.applyKept(ctx, kept)
	return nil
}

// fallBack serves what was kept, or what was kept before, when the control plane
// wants a configuration that may not be applied and nothing is in force yet. It
// does not wait for ApplyLastGood: nothing newer is to be had. It does nothing if
// that would end the process, too. The caller holds f.applying.
func (f *Feed) fallBack(ctx context.Context) {
	if f.serving() {
		return
	}
	for _, name := range []string{lastGoodName, earlierName} {
		if kept, err := f.load(name); err == nil && !f.trial.condemns(kept.hash) {
			f.config.Logger.Error("going back to an earlier configuration: the one that the control plane sends ended this process again and again", "earlier", kept.revision)
			f.applyKept(ctx, kept)
			return
		}
	}
}

// serving reports whether a configuration is in force.
func (f *Feed) serving() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.inForce != nil
}

func (f *Feed) applyKept(ctx context.Context, kept *holding) {
	f.mu.Lock()
	if f.held == nil {
		f.held = kept
	}
	f.mu.Unlock()
	f.trial.begin(kept)
	outcome := f.config.Apply(ctx, Candidate{Snapshot: kept.snapshot(), Unusable: kept.problems()})
	switch {
	case len(outcome.Violations) > 0:
		f.config.Logger.Error("the kept configuration is refused, or a part of it", "revision", kept.revision,
			"held_back", refNames(outcome.HeldBack), "error", &resealv1.ViolationsError{Violations: outcome.Violations})
		f.partOfKept(kept, outcome)
	case f.Connected():
		f.config.Logger.Warn("serving the kept configuration: there is none from the control plane that can be served", "revision", kept.revision)
		f.serveKept(kept)
	default:
		f.config.Logger.Warn("serving the kept configuration: the control plane can't be reached", "revision", kept.revision)
		f.serveKept(kept)
	}
}

// earlier is what to serve in place of a kept configuration that ends the process.
// If there is no other, that one is served after all.
func (f *Feed) earlier(kept *holding) *holding {
	earlier, err := f.load(earlierName)
	if err != nil {
		f.config.Logger.Error("the kept configuration ended this process again and again, but there is no earlier one", "revision", kept.revision, "error", err)
		return kept
	}
	f.config.Logger.Error("the kept configuration ended this process again and again, going back to the one before",
		"revision", kept.revision, "earlier", earlier.revision)
	return earlier
}

// applyCondemned applies what the control plane sent, though it ended the process
// before: there is nothing else to serve.
func (f *Feed) applyCondemned(ctx context.Context) error {
	f.mu.Lock()
	held := f.held
	f.mu.Unlock()
	if held == nil || !f.trial.condemns(held.hash) {
		return nil
	}
	f.config.Logger.Error("applying a configuration that ended this process before, since there is no other", "revision", held.revision)
	f.trial.begin(held)
	answer := f.answer(held, f.config.Apply(ctx, Candidate{Snapshot: held.snapshot(), Unusable: held.problems()}))
	f.tellLate(held, answer)
	return nil
}

func (f *Feed) serveKept(kept *holding) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inForce, f.served = kept, kept.revision
}

// partOfKept notes which part of a kept configuration is in force. The disk keeps
// all of it: what is missing now may be there at the next start.
func (f *Feed) partOfKept(kept *holding, outcome Outcome) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if part, err := kept.part(outcome.InForce, nil); err == nil && outcome.InForce != nil {
		f.inForce = part
	}
	if f.held == kept {
		f.refusal = &resealv1.Nack{Revision: kept.revision, Violations: outcome.Violations}
	}
}

// keep has what is in force written soon.
func (f *Feed) keep(h *holding) { f.writer.write(h) }

// The kept form is a full Update: it says all that an edge holds, with the hash
// to check it.

func (h *holding) marshal() ([]byte, error) {
	return proto.Marshal(&resealv1.Update{
		ClusterId: h.clusterID, Revision: h.revision, Hash: h.hash, Upserts: h.encoded(),
	})
}

func unmarshalHolding(data []byte) (*holding, error) {
	update := &resealv1.Update{}
	if err := proto.Unmarshal(data, update); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLastGood, err)
	}
	if update.GetBaseRevision() != 0 || len(update.GetDeletes()) != 0 {
		return nil, fmt.Errorf("%w: it is not a full configuration", ErrLastGood)
	}
	kept := &holding{clusterID: update.GetClusterId(), revision: update.GetRevision(), hash: update.GetHash(), resources: map[string]*resource{}}
	for _, encoded := range update.GetUpserts() {
		kept.resources[encoded.GetKind()+"/"+encoded.GetName()] = decode(encoded)
	}
	if !bytes.Equal(resealv1.HashEncoded(kept.encoded()), kept.hash) {
		return nil, fmt.Errorf("%w: the hash does not fit the content", ErrLastGood)
	}
	return kept, nil
}

// writer writes holdings in order, out of the way of applies. A newer one replaces
// one that waits.
type writer struct {
	state  State
	logger *slog.Logger
	trial  *trial
	next   chan *holding

	mu     sync.Mutex
	onDisk *holding // nil: not known
}

func newWriter(config Config, tried *trial) *writer {
	return &writer{state: config.State, logger: config.Logger, trial: tried, next: make(chan *holding, 1)}
}

// write has h written soon. Calls must not overlap.
func (w *writer) write(h *holding) {
	select {
	case <-w.next:
	default:
	}
	w.next <- h
}

// wrote notes that h is what the disk holds.
func (w *writer) wrote(h *holding) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.onDisk = h
}

// holds tells whether the disk holds the content of h. A revision that moved on
// is not worth a write: the hash alone tells the control plane what is held.
func (w *writer) holds(h *holding) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.onDisk != nil && w.onDisk.clusterID == h.clusterID && bytes.Equal(w.onDisk.hash, h.hash)
}

// run writes until ended is closed, and then what still waits.
func (w *writer) run(ended <-chan struct{}) error {
	var failed *holding
	again := time.NewTimer(rewriteInterval)
	defer again.Stop()
	again.Stop()
	for {
		select {
		case h := <-w.next:
			failed = w.save(h)
		case <-again.C:
			failed = w.save(failed)
		case <-ended:
			select {
			case failed = <-w.next:
			default:
			}
			if failed != nil {
				w.save(failed)
			}
			return nil
		}
		again.Stop()
		if failed != nil {
			again.Reset(rewriteInterval)
		}
	}
}

// save returns h when it could not be written.
func (w *writer) save(h *holding) *holding {
	if w.holds(h) {
		return nil
	}
	err := exchange.Guard("a configuration was kept", func() error {
		if err := w.rotate(); err != nil {
			return err
		}
		return w.put(lastGoodName, h)
	})
	if err != nil {
		w.logger.Error("the configuration can't be kept for the next start, trying again", "revision", h.revision, "error", err)
		return h
	}
	w.wrote(h)
	return nil
}

// rotate keeps what the disk holds under the other name, if it has proved itself; or
// if it served well for a while, and there is no other.
func (w *writer) rotate() error {
	w.mu.Lock()
	onDisk := w.onDisk
	w.mu.Unlock()
	if onDisk == nil {
		return nil
	}
	if !w.trial.proven(onDisk.hash) {
		if _, err := w.state.Read(earlierName); !errors.Is(err, fs.ErrNotExist) || !w.trial.sound(onDisk.hash) {
			return nil
		}
	}
	return w.put(earlierName, onDisk)
}

func (w *writer) put(name string, h *holding) error {
	data, err := h.marshal()
	if err != nil {
		return err
	}
	return w.state.Write(name, data)
}
