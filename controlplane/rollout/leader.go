package rollout

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/reseal/reseal/controlplane/office"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// lookInterval is the least time between two looks at the fleet while a change is
	// on its way.
	lookInterval = 250 * time.Millisecond
	// retryInterval is the pause after a look that failed.
	retryInterval = time.Second
	// lookTimeout bounds one look.
	lookTimeout = 5 * time.Second
)

// errStale means that a write was based on what has changed: nothing was written.
var errStale = errors.New("the rollout was changed meanwhile")

// stand stands for election and carries rollouts out while this replica leads.
func (s *Server) stand(ctx context.Context) {
	office.Stand(ctx, office.Config{
		Client: s.config.Client, Key: s.office, Name: s.config.Name,
		TTL: s.config.LeaderTTL, RequestTimeout: s.config.RequestTimeout, Logger: s.config.Logger,
	}, func(ctx context.Context, fence office.Fence) error {
		s.config.Logger.Info("this replica rolls changes out")
		s.metrics.leader.Set(1)
		defer s.metrics.leader.Set(0)
		return s.lead(ctx, fence, &evidence{stats: s.config.Stats})
	})
}

// lead does what is due after every change, and looks again and again while one is on
// its way.
func (s *Server) lead(ctx context.Context, fence office.Fence, seen *evidence) error {
	for ctx.Err() == nil {
		r, revision, changed, ok := s.current()
		newest := s.config.Source.Snapshot()
		unknown := !ok || newest.Revision() == 0
		if unknown || r != nil && r.Cluster == newest.ClusterID() && r.Candidate == newest.Revision() && r.Phase != resealv1.Rollout_PHASE_RUNNING {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		begun := time.Now()
		next, err := s.look(ctx, r, newest, seen)
		if err == nil && next != r {
			err = s.write(ctx, next, revision, fence)
		}
		interval := max(lookInterval, 9*time.Since(begun))
		switch {
		case errors.Is(err, office.ErrDeposed):
			return err
		case errors.Is(err, errStale):
			s.config.Logger.Debug("the rollout was changed meanwhile")
			interval = lookInterval
		case err != nil && ctx.Err() == nil:
			s.config.Logger.Warn("the rollout can't go on now", "error", err)
			interval = retryInterval
		case err == nil && next != r:
			s.report(r, next)
			continue
		}
		pause := time.NewTimer(interval)
		select {
		case <-pause.C:
		case <-changed:
		case <-ctx.Done():
		}
		pause.Stop()
	}
	return office.ErrDeposed
}

// look finds out what is next.
func (s *Server) look(ctx context.Context, r *Record, newest *resealv1.Snapshot, seen *evidence) (*Record, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	f, err := s.fleet(ctx, r, newest, seen)
	if err != nil {
		return nil, err
	}
	return Step(time.Now().UTC(), r, f), nil
}

// fleet is what is known now.
func (s *Server) fleet(ctx context.Context, r *Record, newest *resealv1.Snapshot, seen *evidence) (*Fleet, error) {
	f := &Fleet{Cluster: newest.ClusterID(), Newest: newest.Revision(), Policy: policyOf(newest)}
	f.Change, f.By, f.Now = s.config.Source.Origin(f.Newest)
	if r == nil || r.Cluster != f.Cluster || r.Base > f.Newest {
		if r != nil && r.BaseChange > 0 {
			f.Rebased = s.config.Source.RevisionOf(r.BaseChange)
		}
		return f, nil
	}
	if base, err := s.config.Source.At(ctx, r.Base); err == nil {
		f.Policy = policyOf(base)
	}
	edges, missing, err := s.config.Edges(ctx)
	if err != nil {
		return nil, fmt.Errorf("look at the edges: %w", err)
	}
	candidate := r.Candidate
	if r.yields(time.Now()) {
		candidate = f.Newest
	}
	f.Missing = missing
	f.Edges = edgesOf(edges, candidate, s.config.Touched(ctx, r.Base, candidate), time.Now())
	s.count(r, edges)
	if s.config.Stats != nil && r.Candidate == candidate && r.Phase == resealv1.Rollout_PHASE_RUNNING && r.Stage > 0 {
		if f.Shares, err = seen.shares(ctx, r, f.Edges); err != nil {
			return nil, fmt.Errorf("compare the edges: %w", err)
		}
	}
	return f, nil
}

func (s *Server) count(r *Record, edges []*resealv1.Edge) {
	found := counts{edges: len(edges)}
	for _, edge := range edges {
		if r.Has(edge.GetId(), edge.GetLabels()) {
			found.moved++
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moved = found
}

// policyOf is the policy that a configuration holds.
func policyOf(snapshot *resealv1.Snapshot) *resealv1.RolloutPolicy {
	return snapshot.Get("RolloutPolicy", resealv1.DefaultRollout).GetRolloutPolicy()
}

// edgesOf reads what FleetService says of edges.
func edgesOf(edges []*resealv1.Edge, candidate int64, touched func(map[string]string) bool, now time.Time) []Edge {
	found := make([]Edge, len(edges))
	for i, e := range edges {
		found[i] = Edge{
			ID: e.GetId(), Labels: e.GetLabels(), Touched: touched(e.GetLabels()), Connected: e.GetDisconnectedAt() == nil,
			Sent: e.GetSentRevision(), Acked: e.GetAckedRevision(), Refused: refusal(e), Started: e.GetStartedAt().AsTime(),
		}
		for _, c := range e.GetCrashed() {
			if c.GetRevision() == candidate {
				found[i].Crashes += int(c.GetCrashes())
			}
		}
		if !found[i].Connected {
			found[i].Away = now.Sub(e.GetDisconnectedAt().AsTime())
			found[i].Silent = found[i].Sent == candidate && found[i].Acked != candidate &&
				e.GetDisconnectedAt().AsTime().Sub(e.GetSentAt().AsTime()) > silentFor
		}
	}
	return found
}

// refusal is why an edge refused the newest that it was sent, "" when it did not, or did
// refuse the same before.
func refusal(edge *resealv1.Edge) string {
	if !edge.GetRefusedNewly() || edge.GetNack().GetRevision() != edge.GetSentRevision() {
		return ""
	}
	for _, violation := range edge.GetNack().GetViolations() {
		return violation.Text()
	}
	return "it does not say why"
}

// write writes a record in the place of the one that was written at a revision. The zero
// fence is an operator's, who needs no office.
func (s *Server) write(ctx context.Context, r *Record, before int64, fence office.Fence) error {
	value, err := r.encode()
	if err != nil {
		return err
	}
	guards := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.key), "=", before)}
	var otherwise []clientv3.Op
	if fence.Created > 0 {
		guards, otherwise = append(guards, fence.Guard(s.office)), append(otherwise, clientv3.OpGet(fence.Key))
	}
	ctx, cancel := context.WithTimeout(ctx, s.config.RequestTimeout)
	defer cancel()
	answer, err := s.config.Client.Txn(ctx).If(guards...).Then(clientv3.OpPut(s.key, string(value))).Else(otherwise...).Commit()
	switch {
	case err != nil:
		return fmt.Errorf("write the rollout: %w", err)
	case answer.Succeeded:
		s.set(r, answer.Header.Revision)
		return nil
	case fence.Created > 0 && fence.Lost(answer.Responses[0].GetResponseRange().GetKvs()):
		return office.ErrDeposed
	}
	return errStale
}

// report says in the log what was decided.
func (s *Server) report(before, after *Record) {
	log := s.config.Logger
	switch {
	case before == nil:
		log.Info("rollouts begin from this revision", "revision", after.Base)
	case after.Phase == resealv1.Rollout_PHASE_UNDONE, after.Phase == resealv1.Rollout_PHASE_HALTED:
		s.metrics.failures.Inc()
		log.Error("a change was stopped on its way to the edges", "revision", after.Candidate, "base", after.Base,
			"became", resealv1.Label(after.Phase), "reason", after.Reason)
	case after.Phase == resealv1.Rollout_PHASE_DONE:
		log.Info("a change went to all edges", "revision", after.Candidate)
	default:
		log.Info("a change goes to more edges", "revision", after.Candidate, "stage", after.Stage, "edges", after.Moved, "soak", after.Soak)
	}
}
