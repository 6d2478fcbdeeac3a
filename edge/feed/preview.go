package feed

import (
	"context"
	"errors"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// previewTimeout bounds a preview. The control plane waits no longer.
const previewTimeout = 5 * time.Second

var errEmptyPreview = errors.New("the control plane sent no candidate")

// preview follows an order, beside whatever else is going on. Another order that comes
// meanwhile is ignored: the control plane gives one at a time.
func (s *session) preview(ctx context.Context, order *resealv1.PreviewOrder) {
	if s.feed.config.Preview == nil || s.previewing.Swap(true) {
		return
	}
	s.group.Go(func() error {
		defer s.previewing.Store(false)
		bounded, cancel := context.WithTimeout(ctx, previewTimeout)
		defer cancel()
		if err := s.feed.previewOne(bounded, order); err != nil {
			s.feed.config.Logger.Debug("a preview has failed", "error", err)
		}
		return nil // a preview ends no feed
	})
}

func (f *Feed) previewOne(ctx context.Context, order *resealv1.PreviewOrder) error {
	stream, err := f.config.Previews.Preview(ctx)
	if err != nil {
		return err
	}
	start := &resealv1.PreviewStart{Edge: f.config.Edge, Id: order.GetId()}
	if err := stream.Send(&resealv1.PreviewRequest{Message: &resealv1.PreviewRequest_Start{Start: start}}); err != nil {
		_, err = stream.Recv() // which says why
		return err
	}
	response, err := stream.Recv()
	if err != nil {
		return err
	}
	if response.GetUpdate().GetBaseRevision() != 0 || response.GetUpdate() == nil {
		return errEmptyPreview
	}
	candidate, err := (*holding)(nil).with(response.GetUpdate())
	if err != nil {
		return err
	}
	impact := f.config.Preview(ctx, Candidate{Snapshot: candidate.snapshot(), Unusable: candidate.problems()})
	impact.Violations = impact.GetViolations()[:min(len(impact.GetViolations()), maxViolations)]
	if err := stream.Send(&resealv1.PreviewRequest{Message: &resealv1.PreviewRequest_Impact{Impact: impact}}); err != nil {
		return err
	}
	_, _ = stream.Recv() // the control plane has it when it ends the stream
	return nil
}
