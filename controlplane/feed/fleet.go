package feed

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// watchInterval is the least time between two lists of WatchEdges.
const watchInterval = 500 * time.Millisecond

// ListEdges implements resealv1.FleetServiceServer.
func (s *Server) ListEdges(_ context.Context, request *resealv1.ListEdgesRequest) (*resealv1.ListEdgesResponse, error) {
	edges, _ := s.table.list(request.GetId(), request.GetMatchLabels())
	return &resealv1.ListEdgesResponse{Edges: edges}, nil
}

// WatchEdges implements resealv1.FleetServiceServer.
func (s *Server) WatchEdges(request *resealv1.WatchEdgesRequest, stream grpc.ServerStreamingServer[resealv1.WatchEdgesResponse]) error {
	pause := time.NewTimer(watchInterval)
	defer pause.Stop()
	var last []*resealv1.Edge
	for first := true; ; first = false {
		pause.Reset(watchInterval)
		edges, changed := s.table.list("", request.GetMatchLabels())
		if first || !slices.EqualFunc(edges, last, func(a, b *resealv1.Edge) bool { return proto.Equal(a, b) }) {
			if err := stream.Send(&resealv1.WatchEdgesResponse{Edges: edges}); err != nil {
				return err
			}
			last = edges
		}
		// Something must have changed, and changes get time to gather.
		if err := wait(stream.Context(), s, changed); err != nil {
			return err
		}
		if err := wait(stream.Context(), s, pause.C); err != nil {
			return err
		}
	}
}

// wait returns nil when something arrives, and an error when the call or the
// server ends first.
func wait[T any](ctx context.Context, s *Server, arrives <-chan T) error {
	select {
	case <-arrives:
		return nil
	case <-s.stopped:
		return fleet.ErrStopping
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// DrainEdge implements resealv1.FleetServiceServer.
func (s *Server) DrainEdge(ctx context.Context, request *resealv1.DrainEdgeRequest) (*resealv1.DrainEdgeResponse, error) {
	if request.GetId() == "" {
		return nil, status.Error(codes.InvalidArgument, "id: name an edge")
	}
	if timeout := request.GetTimeout(); timeout != nil && (timeout.CheckValid() != nil || timeout.AsDuration() < 0) {
		return nil, status.Error(codes.InvalidArgument, "timeout: must be a duration of at least 0s")
	}
	drain := &resealv1.Drain{Drain: !request.GetUndo(), Timeout: request.GetTimeout()}
	stream, err := s.table.order(request.GetId(), drain)
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "edge %q: %s", request.GetId(), err)
	}
	told := make(chan struct{})
	if !stream.order(order{drainMessage(drain), told}) {
		return nil, status.Errorf(codes.ResourceExhausted, "edge %q has not read earlier orders yet", request.GetId())
	}
	select {
	case <-told:
		s.config.Logger.Info("edge told to drain", "edge", request.GetId(), "undo", request.GetUndo(),
			"timeout", request.GetTimeout().AsDuration())
		return &resealv1.DrainEdgeResponse{Told: true}, nil
	case <-stream.done:
		return nil, status.Errorf(codes.Unavailable, "edge %q left before it could be told; it is told when it comes back within %s", request.GetId(), liveFor)
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// FollowDrain has an edge that is connected here told what Config.Drained says of
// it now. It does not block.
func (s *Server) FollowDrain(id string) {
	drain := s.config.Drained(id)
	if drain == nil {
		drain = &resealv1.Drain{}
	}
	stream, err := s.table.order(id, drain)
	if err != nil {
		return // it is told when it connects
	}
	stream.order(order{message: drainMessage(drain)})
}

func drainMessage(drain *resealv1.Drain) *resealv1.SyncResponse {
	return &resealv1.SyncResponse{Message: &resealv1.SyncResponse_Drain{Drain: drain}}
}

// Connected is how many edges are connected to this replica.
func (s *Server) Connected() int { return s.table.connected() }
