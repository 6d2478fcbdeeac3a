package keyring

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/reseal/reseal/controlplane/office"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// gather is the least time between two looks of the leader, and between two
	// writes of what edges acked, so that the acks of a crowd cost few.
	gather = 20 * time.Millisecond
	// goodbye bounds how long a replica that stops tries to take back what it wrote.
	goodbye = 2 * time.Second
	// maxNamed bounds the laggards that one log line names.
	maxNamed = 20
)

// rotate stands for election and rotates while it leads, until ctx ends.
func (s *Server) rotate(ctx context.Context) error {
	office.Stand(ctx, office.Config{
		Client: s.config.Client, Key: s.keys.election(), Name: s.config.Name,
		TTL: s.config.LeaderTTL, RequestTimeout: s.config.RequestTimeout, Logger: s.log,
	}, func(ctx context.Context, fence office.Fence) error {
		s.log.Info("this replica rotates the keyrings")
		s.metrics.leader.Set(1)
		defer s.metrics.leader.Set(0)
		return s.lead(ctx, fence)
	})
	return nil
}

// lead does what is due, at every change and every tick.
func (s *Server) lead(ctx context.Context, fence office.Fence) error {
	ticker := time.NewTicker(s.config.Tick)
	defer ticker.Stop()
	for ctx.Err() == nil {
		changed := s.state.changed()
		looked, err := s.act(ctx, fence)
		if err != nil {
			return err
		}
		// However large the fleet, the looks take a tenth of a processor.
		_ = pause(ctx, max(gather, 9*looked))
		select {
		case <-ctx.Done():
		case <-changed:
		case <-ticker.C:
		}
	}
	return office.ErrDeposed
}

// pause waits, unless ctx ends first: that is the error then.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	return ctx.Err()
}

// act looks at all keyrings once, and returns how long the look took. It fails with
// office.ErrDeposed only.
func (s *Server) act(ctx context.Context, fence office.Fence) (looked time.Duration, err error) {
	now := time.Now()
	due := s.decide(now)
	looked = time.Since(now)
	for _, d := range due {
		err := s.carryOut(ctx, fence, d)
		switch {
		case errors.Is(err, office.ErrDeposed):
			return looked, err
		case errors.Is(err, errStale):
			s.log.Debug("keyring changed meanwhile", "keyring", d.name)
		case err != nil && ctx.Err() == nil:
			s.log.Warn("keyring can't be rotated now", "keyring", d.name, "error", err)
		}
	}
	return looked, nil
}

// decision is what one keyring needs.
type decision struct {
	name     string
	key      string
	now      time.Time
	before   int64   // the record's mod revision
	record   *record // what to start from; nil: erase
	actions  []Action
	laggards []string
	covered  int64
}

// decide says what is to be done now.
func (s *Server) decide(now time.Time) []decision {
	st := s.state
	st.mu.Lock()
	defer st.mu.Unlock()
	// An older configuration can't tell a keyring that was deleted from one that
	// was just made.
	if !st.ready() || st.behind() {
		return nil
	}
	var decisions []decision
	for name, found := range st.records {
		if _, ok := st.spec(name); !ok {
			decisions = append(decisions, decision{name: name, before: found.revision})
		}
	}
	for _, k := range st.specs {
		d := decision{name: k.name, key: s.keys.record(k.name), now: now}
		found := st.records[k.name]
		switch {
		case found == nil:
			d.record = newRecord(k.uid, st.configured, 0)
		case found.record == nil:
			continue // damaged: an operator must say that it may be lost
		case found.UID != k.uid:
			d.before, d.record = found.revision, newRecord(k.uid, st.configured, found.Last)
		default:
			d.before, d.record = found.revision, found.record
		}
		fleet := st.fleet(k, d.record.ID, d.before, now, s.config.LiveFor)
		d.actions = unseen(Step(now, k.spec, d.record.ring(), fleet))
		if len(d.actions) == 0 {
			continue
		}
		d.laggards = Laggards(d.record.ring().Do(now, d.actions), fleet)
		if slices.ContainsFunc(d.actions, func(a Action) bool { return !a.Due }) {
			d.covered = st.revision
		}
		decisions = append(decisions, d)
	}
	return decisions
}

// unseen leaves out what must wait until all replicas know of an epoch that is being
// prepared: an edge that has just come may have been told of less.
func unseen(actions []Action) []Action {
	if !slices.ContainsFunc(actions, func(a Action) bool { return a.Verb == Prepare }) {
		return actions
	}
	return slices.DeleteFunc(actions, func(a Action) bool { return !a.Due && (a.Verb == Activate || a.Verb == Retire) })
}

func (s *Server) carryOut(ctx context.Context, fence office.Fence, d decision) error {
	w := write{name: d.name, before: d.before, fence: fence, covered: d.covered}
	if d.record == nil {
		revision, err := s.commit(ctx, w)
		if err != nil {
			return err
		}
		s.see(ctx, revision)
		s.log.Info("keyring deleted, its epochs are erased", "keyring", d.name)
		return nil
	}
	var err error
	if w.after, err = d.record.after(d.now, d.key, d.actions, s.config.Seal); err != nil {
		return err
	}
	revision, err := s.commit(ctx, w)
	if err != nil {
		return err
	}
	s.see(ctx, revision)
	s.report(d.name, d.actions, d.laggards, "")
	return nil
}

// report logs and counts what was done, by the leader or for an operator.
func (s *Server) report(name string, actions []Action, laggards []string, author string) {
	for _, action := range actions {
		level, extra := slog.LevelInfo, []any{}
		if action.Verb == Activate {
			s.metrics.rotations.WithLabelValues(name).Inc()
			if action.Due && author == "" {
				level = slog.LevelWarn
				extra = append(extra, "reason", "the deadline has passed", "laggards", named(laggards))
			}
		}
		if author != "" {
			extra = append(extra, "author", author)
		}
		s.log.Log(context.Background(), level, "keyring epoch: "+string(action.Verb), append(extra, "keyring", name, "epoch", action.Epoch)...)
	}
}

func named(ids []string) string {
	if len(ids) > maxNamed {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:maxNamed], ", "), len(ids)-maxNamed)
	}
	return strings.Join(ids, ", ")
}

// epochMessage is an epoch as the protocol shows it.
func epochMessage(e Epoch, spec *resealv1.Keyring) *resealv1.Epoch {
	message := &resealv1.Epoch{
		Number: e.Number, State: e.State,
		PreparedAt: stamp(e.PreparedAt), ActivatedAt: stamp(e.ActivatedAt), RetiredAt: stamp(e.RetiredAt),
	}
	if e.State == resealv1.EpochState_EPOCH_STATE_RETIRED {
		message.EraseAt = stamp(e.EraseAt(spec))
	}
	return message
}
