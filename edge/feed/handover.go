package feed

import (
	"context"
	"fmt"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Pause keeps the configuration in force as it is until Resume, and returns it, nil
// without one: a change that comes meanwhile waits. The trial of the configuration
// ends, since the process that takes over begins one of its own. The error is that of
// ctx, while an apply is under way.
func (f *Feed) Pause(ctx context.Context) ([]byte, error) {
	select {
	case f.applying <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if f.trial.settle() {
		f.trial.write()
	}
	f.mu.Lock()
	inForce := f.inForce
	f.mu.Unlock()
	if inForce == nil {
		return nil, nil
	}
	data, err := inForce.marshal()
	if err != nil {
		f.Resume(true)
		return nil, err
	}
	return data, nil
}

// Resume undoes Pause. If this process stays, the trial of the configuration begins
// again.
func (f *Feed) Resume(stays bool) {
	f.mu.Lock()
	inForce := f.inForce
	f.mu.Unlock()
	if stays && inForce != nil {
		f.trial.begin(inForce) // which does nothing for one that has proved itself
	}
	<-f.applying
}

// Inherit puts in force what Pause returned in the process whose place this one takes.
// That was served, so whatever is refused of it is an error. It is called before Run.
func (f *Feed) Inherit(ctx context.Context, data []byte) error {
	f.applying <- struct{}{}
	defer func() { <-f.applying }()
	inherited, err := unmarshalHolding(data)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.held = inherited
	f.mu.Unlock()
	f.trial.begin(inherited)
	outcome := f.config.Apply(ctx, Candidate{Snapshot: inherited.snapshot(), Unusable: inherited.problems()})
	if len(outcome.Violations) > 0 {
		return fmt.Errorf("the configuration that is served is refused: %w", &resealv1.ViolationsError{Violations: outcome.Violations})
	}
	f.serveWhole(inherited)
	return nil
}
