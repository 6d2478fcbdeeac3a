package admin

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// errNotFound means that a resource that is asked for does not exist.
var errNotFound = errors.New("not found")

// selector is what List and Watch select by.
type selector struct {
	kind   string // "" is every kind
	labels map[string]string
}

func (f selector) matches(r *resealv1.Resource) bool {
	if r == nil || f.kind != "" && r.Kind() != f.kind {
		return false
	}
	labels := r.GetMetadata().GetLabels()
	for name, value := range f.labels {
		if got, ok := labels[name]; !ok || got != value {
			return false
		}
	}
	return true
}

// pick returns the selected resources, sorted by kind and name.
func (f selector) pick(snapshot *resealv1.Snapshot) []*resealv1.Resource {
	all := snapshot.All()
	if f.kind != "" {
		all = snapshot.Kind(f.kind)
	}
	var picked []*resealv1.Resource
	for _, resource := range all {
		if f.matches(resource) {
			picked = append(picked, resource)
		}
	}
	return picked
}

// Get implements the method of AdminService.
func (s *server) Get(ctx context.Context, req *resealv1.GetRequest) (*resealv1.GetResponse, error) {
	ref := req.GetResource()
	if err := checkRefs([]*resealv1.ResourceRef{ref}); err != nil {
		return nil, s.status(ctx, "Get", err)
	}
	resource := s.cfg.Store.Snapshot().Get(ref.GetKind(), ref.GetName())
	if resource == nil {
		return nil, s.status(ctx, "Get", fmt.Errorf("%w: %s", errNotFound, ref.Key()))
	}
	return &resealv1.GetResponse{Resource: s.cfg.Store.Redact(resource)}, nil
}

// List implements the method of AdminService.
func (s *server) List(ctx context.Context, req *resealv1.ListRequest) (*resealv1.ListResponse, error) {
	if err := checkKind(req.GetKind()); err != nil {
		return nil, s.status(ctx, "List", err)
	}
	snapshot := s.cfg.Store.Snapshot()
	picked := selector{kind: req.GetKind(), labels: req.GetMatchLabels()}.pick(snapshot)
	return &resealv1.ListResponse{Resources: s.redact(picked), Revision: snapshot.Revision()}, nil
}

// Watch implements the method of AdminService. A slow reader skips revisions;
// nothing is queued for it.
func (s *server) Watch(req *resealv1.WatchRequest, stream grpc.ServerStreamingServer[resealv1.WatchResponse]) error {
	ctx := stream.Context()
	if err := checkKind(req.GetKind()); err != nil {
		return s.status(ctx, "Watch", err)
	}
	chosen := selector{kind: req.GetKind(), labels: req.GetMatchLabels()}
	held := s.cfg.Store.Snapshot()
	next := s.reset(chosen, held)
	for {
		if next != nil {
			if err := stream.Send(next); err != nil {
				return err // gRPC's own status
			}
		}
		snapshot, err := s.cfg.Store.Next(ctx, held.Revision())
		if err != nil {
			return s.status(ctx, "Watch", err)
		}
		next = s.step(chosen, held, snapshot)
		held = snapshot
	}
}

// reset tells a watcher all there is.
func (s *server) reset(chosen selector, snapshot *resealv1.Snapshot) *resealv1.WatchResponse {
	return &resealv1.WatchResponse{Revision: snapshot.Revision(), Reset_: true, Resources: s.redact(chosen.pick(snapshot))}
}

// step tells a watcher how to get from held to snapshot. It is nil when nothing
// that is watched differs.
func (s *server) step(chosen selector, held, snapshot *resealv1.Snapshot) *resealv1.WatchResponse {
	// Before the first load a snapshot has no cluster and no resources.
	if snapshot.Revision() < held.Revision() || held.Revision() > 0 && snapshot.ClusterID() != held.ClusterID() {
		return s.reset(chosen, snapshot)
	}
	resp := &resealv1.WatchResponse{Revision: snapshot.Revision()}
	for _, resource := range chosen.pick(snapshot) {
		before := held.Get(resource.Kind(), resource.GetMetadata().GetName())
		// What joins the selection has changed, too.
		if before.GetMetadata().GetRevision() != resource.GetMetadata().GetRevision() {
			resp.Resources = append(resp.Resources, s.cfg.Store.Redact(resource))
		}
	}
	for _, before := range chosen.pick(held) {
		if !chosen.matches(snapshot.Get(before.Kind(), before.GetMetadata().GetName())) {
			resp.Deletes = append(resp.Deletes, before.Ref())
		}
	}
	if len(resp.Resources)+len(resp.Deletes) == 0 {
		return nil
	}
	return resp
}

func (s *server) redact(resources []*resealv1.Resource) []*resealv1.Resource {
	redacted := make([]*resealv1.Resource, len(resources))
	for i, resource := range resources {
		redacted[i] = s.cfg.Store.Redact(resource)
	}
	return redacted
}
