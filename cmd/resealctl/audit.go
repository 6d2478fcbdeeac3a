package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxShownResources is how many resources stand in a row of the table.
const maxShownResources = 3

func newAuditCommand(a *app) *cobra.Command {
	var (
		since          time.Duration
		user, resource string
		watch          bool
	)
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Show who did what, and who was refused",
		Long: `Show who did what, from where and to what: every change, and calls that were
refused, if there are many some an hour of those. -o json and yaml also have what became of each
resource: the SHA-256 before and after, and how they differ, without secrets.

The control planes keep 10,000 entries, each with the hash of the one before. One
that does not fit, because somebody changed the log in etcd, is shown and warned
of, whatever is asked for.`,
		Example: "  resealctl audit --since 24h --user alice\n  resealctl audit --resource backendpool/jetty\n  resealctl audit -w -o json",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().DurationVar(&since, "since", 0, "only entries that are younger")
	cmd.Flags().StringVar(&user, "user", "", "only calls of this `user`: its name, or ROLE/NAME")
	cmd.Flags().StringVar(&resource, "resource", "", "only what concerns this, `KIND/NAME`; also edge/ID, user/NAME, keyring/NAME, token/ID, rollout, backup")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on with entries as they are made")
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if since < 0 {
			return usagef("--since can't be negative")
		}
		client, err := a.connect()
		if err != nil {
			return err
		}
		request := &resealv1.ReadAuditRequest{User: user, Resource: auditedName(resource), Follow: watch}
		if since > 0 {
			request.Since = durationpb.New(since)
		}
		return a.printAudit(cmd.Context(), client, format, request)
	}
	return cmd
}

// auditedName takes short names of kinds, such as pool/jetty.
func auditedName(text string) string {
	word, name, found := strings.Cut(text, "/")
	if kind, err := kindByName(word); found && err == nil && kind != kindAll && kind != kindEdges && !strings.EqualFold(word, "keyring") {
		return kind + "/" + name
	}
	return text
}

func (a *app) printAudit(ctx context.Context, c *client, f *format, request *resealv1.ReadAuditRequest) error {
	stream, err := c.admin.ReadAudit(ctx, request)
	if err != nil {
		return err
	}
	t := newTable(a.out, "TIME", "USER", "FROM", "ACTION", "ON", "OUTCOME", "MESSAGE")
	views := []auditView{}
	for {
		response, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return a.endAudit(f, t, views)
		case errors.Is(err, errInterrupted) && request.GetFollow():
			return nil
		case err != nil:
			return err
		}
		for _, entry := range response.GetEntries() {
			if entry.GetBroken() {
				a.warnf("Warning: entry %d does not follow the one before: the audit log was changed\n", entry.GetNumber())
			}
			switch {
			case f.structured() && request.GetFollow():
				a.separateDocuments(f)
				if err := a.printDocument(f, viewAudit(entry)); err != nil {
					return err
				}
			case f.structured():
				views = append(views, viewAudit(entry))
			default:
				t.add(stamp(entry.GetTime()), entry.GetUser(), entry.GetSource(), entry.GetAction(), auditedText(entry), entry.GetOutcome(), auditMessage(entry))
			}
		}
		if !f.structured() {
			t.flush()
		}
	}
}

// endAudit prints what was collected.
func (a *app) endAudit(f *format, t *table, views []auditView) error {
	if f.structured() {
		return a.printDocument(f, map[string]any{"entries": views})
	}
	if t.headers != nil { // nothing was written
		a.warnf("No entries.\n")
	}
	return nil
}

// auditedText names what an entry is about.
func auditedText(entry *resealv1.AuditEntry) string {
	var names []string
	for _, r := range entry.GetResources() {
		names = append(names, strings.TrimSpace(r.GetResource()+" "+r.GetChange()))
	}
	all := len(names) + int(entry.GetMoreResources())
	if len(names) > maxShownResources {
		names = append(names[:maxShownResources-1], fmt.Sprintf("%d more", all-maxShownResources+1))
	}
	return orNone(strings.Join(names, ", "))
}

func auditMessage(entry *resealv1.AuditEntry) string {
	text := entry.GetMessage()
	if entry.GetError() != "" {
		text = entry.GetError()
	}
	if n := entry.GetSuppressed(); n > 0 {
		text += fmt.Sprintf(" (and %d calls before it that were not recorded)", n)
	}
	return text
}

// auditView is an entry as -o json and yaml show it.
type auditView struct {
	Number        uint64            `json:"number"`
	Time          string            `json:"time"`
	User          string            `json:"user"`
	Source        string            `json:"source"`
	Action        string            `json:"action"`
	Resources     []auditedResource `json:"resources"`
	MoreResources uint32            `json:"moreResources"`
	Message       string            `json:"message"`
	Outcome       string            `json:"outcome"`
	Error         string            `json:"error"`
	Suppressed    uint64            `json:"suppressed"`
	Revision      int64             `json:"revision"`
	Previous      string            `json:"previous"`
	Hash          string            `json:"hash"`
	Broken        bool              `json:"broken"`
}

type auditedResource struct {
	Resource string `json:"resource"`
	Change   string `json:"change"`
	Before   string `json:"before"`
	After    string `json:"after"`
	Diff     string `json:"diff"`
}

func viewAudit(e *resealv1.AuditEntry) auditView {
	view := auditView{Number: e.GetNumber(), Time: utcStamp(e.GetTime()), User: e.GetUser(), Source: e.GetSource(), Action: e.GetAction(),
		Resources: []auditedResource{}, MoreResources: e.GetMoreResources(), Message: e.GetMessage(), Outcome: e.GetOutcome(), Error: e.GetError(),
		Suppressed: e.GetSuppressed(), Revision: e.GetRevision(), Previous: e.GetPrevious(), Hash: e.GetHash(), Broken: e.GetBroken()}
	for _, r := range e.GetResources() {
		view.Resources = append(view.Resources, auditedResource{r.GetResource(), r.GetChange(), r.GetBefore(), r.GetAfter(), r.GetDiff()})
	}
	return view
}
