package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// app is one run of the command: what it talks to, its global settings and its
// connection.
type app struct {
	console
	settings settings
	started  bool // a command's own code runs: what fails now is not usage
	client   *client
	// noRenewal leaves a certificate as it is.
	noRenewal bool
}

// settings are the global flags. Each can also be given as a variable.
type settings struct {
	config          string
	context         string
	controlPlane    []string
	trustDomain     string
	caFile          string
	certificateFile string
	privateKeyFile  string
	timeout         time.Duration
}

const rootLong = `resealctl configures, watches and measures a Reseal fleet.

It finds the control plane by a context: a name, addresses and a client
certificate, kept in ~/.config/reseal/config.yaml (resealctl config --help).
Every global flag can also be given as a variable, for example --control-plane
as RESEAL_CONTROL_PLANE. Flags come before variables, variables before the file.

Exit codes: 0 all is well, 1 it failed, 2 the command line is wrong. For diff:
0 nothing differs, 1 something differs, 2 it failed.`

func newRootCommand(a *app) *cobra.Command {
	root := newGroupCommand("resealctl", "Configure, watch and measure a Reseal fleet", rootLong)
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return a.readVariables(cmd) }
	a.settings.register(root.PersistentFlags())
	_ = root.RegisterFlagCompletionFunc("context", a.completeContexts)
	groups := []struct {
		title    string
		commands []*cobra.Command
	}{
		{"Configuration:", []*cobra.Command{newApplyCommand(a), newDiffCommand(a), newDeleteCommand(a),
			newGetCommand(a), newDescribeCommand(a), newExplainCommand(a)}},
		{"History:", []*cobra.Command{newHistoryCommand(a), newRollbackCommand(a), newRolloutCommand(a), newAuditCommand(a)}},
		{"Fleet:", []*cobra.Command{newFleetStatusCommand(a), newStatsCommand(a), newTopCommand(a), newObserveCommand(a), newDiagnoseCommand(a), newProbeCommand(a),
			newDrainCommand(a), newTokenCommand(a), newRevokeCommand(a), newUserCommand(a), newKeyringCommand(a), newBackupCommand(a)}},
		{"This command:", []*cobra.Command{newConfigCommand(a), newAuthCommand(a), newWhoamiCommand(a), newVersionCommand(a)}},
	}
	for _, group := range groups {
		root.AddGroup(&cobra.Group{ID: group.title, Title: group.title})
		for _, command := range group.commands {
			command.GroupID = group.title
			root.AddCommand(command)
		}
	}
	root.SetHelpCommandGroupID("This command:")
	root.SetCompletionCommandGroupID("This command:")
	a.markStart(root)
	return root
}

func (s *settings) register(flags *pflag.FlagSet) {
	flags.StringVar(&s.config, "config", "", "file with contexts (default ~/.config/reseal/config.yaml)")
	flags.StringVar(&s.context, "context", "", "name of the context (default the file's current one)")
	flags.StringSliceVar(&s.controlPlane, "control-plane", nil, "control plane, `host:port`; several are tried in turn")
	flags.StringVar(&s.trustDomain, "trust-domain", "", "trust domain of the control plane's certificate")
	flags.StringVar(&s.caFile, "ca-file", "", "PEM file with the control plane's roots")
	flags.StringVar(&s.certificateFile, "certificate-file", "", "PEM file with the client certificate")
	flags.StringVar(&s.privateKeyFile, "private-key-file", "", "PEM file with the client certificate's key")
	flags.DurationVar(&s.timeout, "timeout", 30*time.Second, "bound for one answer of the control plane")
}

// readVariables gives each global flag that is not on the command line the
// value of its variable.
func (a *app) readVariables(cmd *cobra.Command) error {
	var failed error
	cmd.Root().PersistentFlags().VisitAll(func(flag *pflag.Flag) {
		name := "RESEAL_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		value := a.getenv(name)
		if flag.Changed || value == "" || failed != nil {
			return
		}
		if err := flag.Value.Set(value); err != nil {
			failed = usagef("%s=%q: %v", name, value, err)
		}
	})
	if failed == nil && a.settings.timeout <= 0 {
		failed = usagef("--timeout must be more than 0")
	}
	return failed
}

// markStart makes every command note that its own code runs. An error before
// that is cobra's: arguments and flags that are wrong.
func (a *app) markStart(cmd *cobra.Command) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			a.started = true
			return run(cmd, args)
		}
	}
	for _, child := range cmd.Commands() {
		a.markStart(child)
	}
}

// newGroupCommand is a command that only has subcommands.
func newGroupCommand(use, short, long string, children ...*cobra.Command) *cobra.Command {
	group := &cobra.Command{
		Use:   use,
		Short: short,
		Long:  long,
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			text := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				text += fmt.Sprintf("; did you mean %q?", near[0])
			}
			return usagef("%s", text)
		},
	}
	group.SuggestionsMinimumDistance = 2
	group.AddCommand(children...)
	return group
}

func (a *app) printf(format string, args ...any) {
	fmt.Fprintf(a.out, format, args...)
}

func (a *app) warnf(format string, args ...any) {
	fmt.Fprintf(a.err, format, args...)
}

// close ends the connection, if there is one.
func (a *app) close() {
	if a.client != nil {
		a.client.conn.Close()
	}
}
