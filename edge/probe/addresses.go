package probe

import (
	"context"
	"crypto/tls"
	"errors"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// compareAddresses checks whether the other addresses show the certificate of
// the first and take its sessions.
func (r *run) compareAddresses(ctx context.Context) error {
	if len(r.targets) == 1 {
		return nil
	}
	chains := r.chains
	if len(chains) == 0 {
		// Without sessions there is still a certificate to compare.
		chains = []*chain{r.newChain(0, &resealv1.ProbeVersion{})}
	}
	// The newest version first: it is the one that edges will speak.
	for i := len(chains) - 1; i >= 0; i-- {
		for _, other := range r.targets[1:] {
			if other.facts.Error != "" {
				continue
			}
			if err := r.compare(ctx, chains[i], other); err != nil {
				r.summarise()
				return err
			}
		}
	}
	r.summarise()
	return nil
}

// compare offers a session of the first address to another one.
func (r *run) compare(ctx context.Context, c *chain, other *target) error {
	if err := r.refresh(ctx, c, other); err != nil {
		return err
	}
	purpose := "certificate"
	if c.version != 0 {
		purpose = tls.VersionName(c.version) + " session of " + r.first().address
	}
	l, err := r.connect(ctx, c, other, purpose)
	if err != nil {
		if errors.Is(err, errEnough) || ctx.Err() != nil {
			return err
		}
		other.facts.Error = err.Error()
		return nil
	}
	l.use()
	l.end(endNotify)
	if l.offered() {
		other.facts.Shares = both(other.facts.Shares, l.record.Resumed)
	}
	return nil
}

// refresh makes sure that the session which c offers next is of the first
// address.
func (r *run) refresh(ctx context.Context, c *chain, other *target) error {
	for try := 0; try < 2 && c.version != 0 && (!c.holding || c.origin != r.first()); try++ {
		if try > 0 || c.handshaker != nil {
			// A resumed handshake need not bring a new session, a full one does.
			c.renew(r)
		}
		l, err := r.connect(ctx, c, r.first(), "session for "+other.address)
		if err != nil {
			return err
		}
		l.use()
		l.end(endNotify)
	}
	return nil
}

// both adds one more yes or no to an answer.
func both(answer resealv1.ProbeAnswer, yes bool) resealv1.ProbeAnswer {
	next := answerNo
	if yes {
		next = answerYes
	}
	if answer == 0 || answer == next {
		return next
	}
	return answerMixed
}

// summarise says of all addresses what was found out about each.
func (r *run) summarise() {
	certificate := r.first().facts.Certificate
	for _, other := range r.targets[1:] {
		if other.facts.Certificate != "" {
			r.report.SameCertificate = both(r.report.SameCertificate, other.facts.Certificate == certificate)
		}
		switch shares := other.facts.Shares; {
		case shares == answerMixed:
			r.report.Shared = answerMixed
		case shares != 0:
			r.report.Shared = both(r.report.Shared, shares == answerYes)
		}
		if other.facts.Error != "" {
			r.note("%s could not be probed: %s", other.address, other.facts.Error)
		}
	}
	if r.report.SameCertificate == answerMixed {
		r.report.SameCertificate = answerNo
	}
}
