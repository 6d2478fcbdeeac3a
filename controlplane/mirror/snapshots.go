package mirror

import (
	"context"
	"fmt"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Snapshots has take get each snapshot that next brings, but for those that a newer one
// overtakes, until ctx ends; then it returns nil, and otherwise the error of next, which
// names who follows. next waits for a snapshot newer than a revision, or of a new
// numbering.
func Snapshots(ctx context.Context, who string, next func(ctx context.Context, after int64) (*resealv1.Snapshot, error), take func(*resealv1.Snapshot)) error {
	var revision int64
	for {
		snapshot, err := next(ctx, revision)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("%s: wait for the next snapshot: %w", who, err)
		}
		revision = snapshot.Revision()
		take(snapshot)
	}
}
