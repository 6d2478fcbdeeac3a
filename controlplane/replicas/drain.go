package replicas

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Orders keeps what operators order edges, for all replicas.
type Orders struct {
	// Drain takes an edge out of service, Undrain puts it back.
	Drain   func(ctx context.Context, edge string, timeout time.Duration) error
	Undrain func(ctx context.Context, edge string) error
	// Drained tells whether it is to be out of service.
	Drained func(edge string) bool
	// Enrolled tells whether there is an edge of that name, connected or not.
	Enrolled func(ctx context.Context, edge string) (bool, error)
}

// DrainEdge implements resealv1.FleetServiceServer. The order is written first: the
// replica that the edge is connected to, now or later, learns of it by etcd. Then
// that replica is asked to tell the edge, so that the caller knows that it was told.
func (f *Fleet) DrainEdge(ctx context.Context, request *resealv1.DrainEdgeRequest) (*resealv1.DrainEdgeResponse, error) {
	if f.FromReplica(ctx) {
		return f.Fleet.DrainEdge(ctx, request)
	}
	if request.GetId() == "" {
		return nil, status.Error(codes.InvalidArgument, "id: name an edge")
	}
	if timeout := request.GetTimeout(); timeout != nil && (timeout.CheckValid() != nil || timeout.AsDuration() < 0) {
		return nil, status.Error(codes.InvalidArgument, "timeout: must be a duration of at least 0s")
	}
	holder, lost := f.holder(ctx, request.GetId())
	if lost != nil && !errors.Is(lost, errHere) && !f.Orders.Drained(request.GetId()) {
		if known, err := f.Orders.Enrolled(ctx, request.GetId()); err != nil {
			return nil, status.Errorf(codes.Unavailable, "edge %q: %v", request.GetId(), err)
		} else if !known {
			return nil, lost
		}
	}
	var err error
	if request.GetUndo() {
		err = f.Orders.Undrain(ctx, request.GetId())
	} else {
		err = f.Orders.Drain(ctx, request.GetId(), request.GetTimeout().AsDuration())
	}
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "edge %q: %v", request.GetId(), err)
	}
	switch {
	case errors.Is(lost, errHere):
		_, err = f.Fleet.DrainEdge(ctx, request)
	case lost != nil:
		err = lost
	default:
		bounded, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		_, err = resealv1.NewFleetServiceClient(holder.conn).DrainEdge(bounded, request)
	}
	switch status.Code(err) {
	case codes.OK:
		return &resealv1.DrainEdgeResponse{Told: true}, nil
	case codes.InvalidArgument, codes.Internal:
		return nil, err
	}
	return &resealv1.DrainEdgeResponse{}, nil
}
