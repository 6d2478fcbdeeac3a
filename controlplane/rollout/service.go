package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/controlplane/fleet"
	"github.com/reseal/reseal/controlplane/office"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// watchInterval is the least time between two responses of a watch.
	watchInterval = 500 * time.Millisecond
	// maxNamed bounds the edges that a response names.
	maxNamed = 20
	// orderAttempts bounds how often an order is tried that the leader was faster than.
	orderAttempts = 10
)

// GetRollout implements the method of FleetService.
func (s *Server) GetRollout(ctx context.Context, _ *resealv1.GetRolloutRequest) (*resealv1.GetRolloutResponse, error) {
	rollout, err := s.describe(ctx)
	if err != nil {
		return nil, err
	}
	return &resealv1.GetRolloutResponse{Rollout: rollout}, nil
}

// WatchRollout implements the method of FleetService.
func (s *Server) WatchRollout(_ *resealv1.WatchRolloutRequest, stream grpc.ServerStreamingServer[resealv1.WatchRolloutResponse]) error {
	ctx := stream.Context()
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	var last *resealv1.Rollout
	for {
		rollout, err := s.describe(ctx)
		if err != nil {
			return err
		}
		if last == nil || !proto.Equal(last, rollout) {
			if err := stream.Send(&resealv1.WatchRolloutResponse{Rollout: rollout}); err != nil {
				return err
			}
			last = rollout
		}
		select {
		case <-ticker.C:
		case <-s.stopped:
			return fleet.ErrStopping
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// PauseRollout implements the method of FleetService.
func (s *Server) PauseRollout(ctx context.Context, request *resealv1.PauseRolloutRequest) (*resealv1.PauseRolloutResponse, error) {
	rollout, err := s.order(ctx, "paused", request.GetReason(), func(r *Record, by string) (*Record, error) {
		return r.Pause(time.Now().UTC(), by, request.GetReason())
	})
	return &resealv1.PauseRolloutResponse{Rollout: rollout}, err
}

// ResumeRollout implements the method of FleetService.
func (s *Server) ResumeRollout(ctx context.Context, _ *resealv1.ResumeRolloutRequest) (*resealv1.ResumeRolloutResponse, error) {
	rollout, err := s.order(ctx, "resumed", "", func(r *Record, by string) (*Record, error) {
		return r.Resume(time.Now().UTC(), by)
	})
	return &resealv1.ResumeRolloutResponse{Rollout: rollout}, err
}

// UndoRollout implements the method of FleetService.
func (s *Server) UndoRollout(ctx context.Context, request *resealv1.UndoRolloutRequest) (*resealv1.UndoRolloutResponse, error) {
	rollout, err := s.order(ctx, "undone", request.GetReason(), func(r *Record, by string) (*Record, error) {
		return r.Undo(time.Now().UTC(), by, request.GetReason())
	})
	return &resealv1.UndoRolloutResponse{Rollout: rollout}, err
}

// order carries out what an operator wants.
func (s *Server) order(ctx context.Context, verb, reason string, do func(*Record, string) (*Record, error)) (*resealv1.Rollout, error) {
	if len(reason) > maxReason {
		return nil, status.Errorf(codes.InvalidArgument, "reason: it has %d bytes, at most %d are taken", len(reason), maxReason)
	}
	by := s.config.Author(ctx)
	for range orderAttempts {
		r, revision, changed, ok := s.current()
		if !ok || r == nil {
			return nil, errUnknown
		}
		next, err := do(r, by)
		if err != nil {
			return nil, status.Error(codes.FailedPrecondition, err.Error())
		}
		switch err := s.write(ctx, next, revision, office.Fence{}); {
		case errors.Is(err, errStale):
			select { // until the watch brings it
			case <-changed:
			case <-ctx.Done():
				return nil, status.FromContextError(ctx.Err()).Err()
			}
		case err != nil:
			return nil, status.Errorf(codes.Unavailable, "%v; see rollout status for whether it was done", err)
		default:
			s.config.Logger.Info("rollout "+verb, "revision", r.Candidate, "author", by, "reason", reason)
			return s.describe(ctx)
		}
	}
	return nil, status.Error(codes.Aborted, "the rollout changes all the time; try again")
}

// errUnknown means that the record has not been read, or written, yet.
var errUnknown = status.Error(codes.Unavailable, "where the rollout stands is not known yet; try again")

// describe is the rollout as operators see it.
func (s *Server) describe(ctx context.Context) (*resealv1.Rollout, error) {
	r := s.Record()
	if r == nil {
		return nil, errUnknown
	}
	found, missing, err := s.config.Edges(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	f := &Fleet{
		Newest: s.config.Source.Snapshot().Revision(), Missing: missing,
		Edges: edgesOf(found, r.Candidate, s.config.Touched(ctx, r.Base, r.Candidate), now),
	}
	rollout := r.message(f)
	rollout.Leader = s.leader(ctx)
	for _, edge := range found {
		if r.underWay() && edge.GetTargetRevision() == r.Candidate {
			rollout.Moved++
			rollout.MovedEdges = append(rollout.MovedEdges, edge.GetId())
		}
	}
	if !r.underWay() && r.Phase == resealv1.Rollout_PHASE_DONE {
		rollout.Moved = rollout.GetEdges()
	}
	slices.Sort(rollout.MovedEdges)
	rollout.MovedEdges = rollout.MovedEdges[:min(len(rollout.MovedEdges), maxNamed)]
	return rollout, nil
}

// message is what the record says.
func (r *Record) message(f *Fleet) *resealv1.Rollout {
	rollout := &resealv1.Rollout{
		Phase: r.Phase, BaseRevision: r.Base, CandidateRevision: r.Candidate, NewestRevision: f.Newest,
		Stage: int32(r.Stage), Stages: r.Policy.stages(), Edges: int32(len(f.Edges)),
		StartedAt: timestamppb.New(r.Started), EnteredAt: timestamppb.New(r.Entered), Reason: r.Reason, By: r.By, Now: r.Now,
	}
	if r.Phase == resealv1.Rollout_PHASE_RUNNING {
		rollout.NextAt = timestamppb.New(r.Entered.Add(r.Soak))
		waits := r.waits(f)
		slices.Sort(waits)
		rollout.WaitingFor = waits[:min(len(waits), maxNamed)]
	}
	return rollout
}

// stages are those of the policy, for people.
func (p policy) stages() []string {
	var texts []string
	for _, stage := range p.GetStages() {
		switch {
		case stage.GetEdgeSelector() != nil:
			var pairs []string
			for name, value := range stage.GetEdgeSelector().GetMatchLabels() {
				pairs = append(pairs, name+"="+value)
			}
			slices.Sort(pairs)
			texts = append(texts, strings.Join(pairs, ","))
		case stage.GetEdges() == 1:
			texts = append(texts, "1 edge")
		case stage.GetEdges() > 0:
			texts = append(texts, fmt.Sprintf("%d edges", stage.GetEdges()))
		case stage.GetPercent() == 100:
			texts = append(texts, "all")
		default:
			texts = append(texts, fmt.Sprintf("%d%%", stage.GetPercent()))
		}
	}
	if len(texts) == 0 || texts[len(texts)-1] != "all" {
		texts = append(texts, "all")
	}
	return texts
}

// leader is the replica that carries rollouts out, "" when that is not known.
func (s *Server) leader(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	answer, err := s.config.Client.Get(ctx, s.office+"/", clientv3.WithFirstCreate()...)
	if err != nil || len(answer.Kvs) == 0 {
		return ""
	}
	return string(answer.Kvs[0].Value)
}

// Annotate says of revisions what became of them on their way to the edges.
func (s *Server) Annotate(revisions []*resealv1.Revision) {
	r := s.Record()
	if r == nil {
		return
	}
	for _, revision := range revisions {
		revision.Rollout = r.Verdict(revision.GetRevision())
	}
}
