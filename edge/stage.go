package edge

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// stage is a part of an edge that runs until it is ended, whatever becomes of the
// context of its maker.
type stage struct {
	ctx   context.Context
	stop  context.CancelFunc
	group errgroup.Group
}

func newStage(ctx context.Context) *stage {
	s := &stage{}
	s.ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	return s
}

func (s *stage) start(run func(context.Context) error) {
	s.group.Go(func() error { return run(s.ctx) })
}

// end ends the stage and waits for that. A second call does nothing but that.
func (s *stage) end() error {
	s.stop()
	return s.group.Wait()
}
