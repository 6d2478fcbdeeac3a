package replicas

import (
	"context"

	"google.golang.org/grpc"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Rollout is the part of FleetService that is about the rollout. It is in etcd, so that
// any replica answers for all.
type Rollout interface {
	GetRollout(context.Context, *resealv1.GetRolloutRequest) (*resealv1.GetRolloutResponse, error)
	WatchRollout(*resealv1.WatchRolloutRequest, grpc.ServerStreamingServer[resealv1.WatchRolloutResponse]) error
	PauseRollout(context.Context, *resealv1.PauseRolloutRequest) (*resealv1.PauseRolloutResponse, error)
	ResumeRollout(context.Context, *resealv1.ResumeRolloutRequest) (*resealv1.ResumeRolloutResponse, error)
	UndoRollout(context.Context, *resealv1.UndoRolloutRequest) (*resealv1.UndoRolloutResponse, error)
}

func (f *Fleet) rollout() Rollout {
	if f.Services.Rollout == nil {
		return f.UnimplementedFleetServiceServer
	}
	return f.Services.Rollout
}

// GetRollout implements resealv1.FleetServiceServer.
func (f *Fleet) GetRollout(ctx context.Context, request *resealv1.GetRolloutRequest) (*resealv1.GetRolloutResponse, error) {
	return f.rollout().GetRollout(ctx, request)
}

// WatchRollout implements resealv1.FleetServiceServer.
func (f *Fleet) WatchRollout(request *resealv1.WatchRolloutRequest, stream grpc.ServerStreamingServer[resealv1.WatchRolloutResponse]) error {
	return f.rollout().WatchRollout(request, stream)
}

// PauseRollout implements resealv1.FleetServiceServer.
func (f *Fleet) PauseRollout(ctx context.Context, request *resealv1.PauseRolloutRequest) (*resealv1.PauseRolloutResponse, error) {
	return f.rollout().PauseRollout(ctx, request)
}

// ResumeRollout implements resealv1.FleetServiceServer.
func (f *Fleet) ResumeRollout(ctx context.Context, request *resealv1.ResumeRolloutRequest) (*resealv1.ResumeRolloutResponse, error) {
	return f.rollout().ResumeRollout(ctx, request)
}

// UndoRollout implements resealv1.FleetServiceServer.
func (f *Fleet) UndoRollout(ctx context.Context, request *resealv1.UndoRolloutRequest) (*resealv1.UndoRolloutResponse, error) {
	return f.rollout().UndoRollout(ctx, request)
}
