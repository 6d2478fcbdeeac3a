package controlplane

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/controlplane/etcd"
	"github.com/reseal/reseal/controlplane/feed"
	"github.com/reseal/reseal/controlplane/replicas"
	"github.com/reseal/reseal/controlplane/rollout"
	"github.com/reseal/reseal/controlplane/sessions"
	"github.com/reseal/reseal/controlplane/store"
	"github.com/reseal/reseal/controlplane/tally"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// newRollout makes what brings changes to the edges in stages.
func (c *ControlPlane) newRollout(kept *etcd.Store, listening net.Addr, server *feed.Server, edges *replicas.Fleet, counters *replicas.Tally) *rollout.Server {
	return rollout.New(rollout.Config{
		Client: kept.Client,
		Name:   leaderName(c.cfg.ReplicaName, listening),
		Source: c.store,
		Edges: func(ctx context.Context) ([]*resealv1.Edge, []string, error) {
			list, err := edges.ListEdges(ctx, &resealv1.ListEdgesRequest{})
			if err != nil {
				return nil, nil, err
			}
			var missing []string
			for _, replica := range list.GetUnanswered() {
				missing = append(missing, fmt.Sprintf("%s (%s)", replica.GetId(), replica.GetReason()))
			}
			return list.GetEdges(), missing, nil
		},
		Stats: func(ctx context.Context, edge string, since time.Duration) (*resealv1.EdgeStats, error) {
			request := &resealv1.GetStatsRequest{Edge: edge}
			if since > 0 {
				request.Since = durationpb.New(since)
			}
			stats, err := counters.GetStats(ctx, request)
			if err != nil {
				return nil, err
			}
			if len(stats.GetEdges()) != 1 {
				return nil, status.Errorf(codes.NotFound, "edge %q reports nothing", edge)
			}
			return stats.GetEdges()[0], nil
		},
		Touched:    server.Touched,
		Aim:        server.Aim,
		Author:     c.author,
		Logger:     c.cfg.Logger.With("part", "rollout"),
		Registerer: c.registry,
	})
}

// serving knows what edges may serve: the newest configuration, and the one that edges
// have which did not get it yet, or any more.
type serving struct {
	store        *store.Store
	record       func() *rollout.Record
	newest, base tally.Assignments
	last         atomic.Pointer[resealv1.Snapshot] // that behind returned
}

// behind is the configuration that all edges have served, nil when that is the newest.
func (s *serving) behind() *resealv1.Snapshot {
	r := s.record()
	if r == nil || r.Base == s.store.Snapshot().Revision() {
		return nil
	}
	if last := s.last.Load(); last != nil && last.Revision() == r.Base && last.ClusterID() == r.Cluster {
		return last
	}
	base, err := s.store.At(context.Background(), r.Base) // from memory
	if err != nil {
		return nil
	}
	s.last.Store(base)
	return base
}

// assigned are the names of pools and listeners that edges with labels may have.
func (s *serving) assigned(labels map[string]string) (pools, listeners map[string]bool) {
	pools, listeners = s.newest.Of(s.store.Snapshot(), labels)
	if base := s.behind(); base != nil {
		morePools, moreListeners := s.base.Of(base, labels)
		pools, listeners = union(pools, morePools), union(listeners, moreListeners)
	}
	return pools, listeners
}

func union(a, b map[string]bool) map[string]bool {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// shared are the pools of edges with labels whose sessions are shared.
func (s *serving) shared(labels map[string]string) []string {
	pools := sessions.SharedPools(s.store.Snapshot(), labels)
	if base := s.behind(); base != nil {
		pools = append(pools, sessions.SharedPools(base, labels)...)
		slices.Sort(pools)
		pools = slices.Compact(pools)
	}
	return pools
}
